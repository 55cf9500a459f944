"""A study's search: its cases, its keys, and a trial as the study for one case with the searched keys at given values.

A trial's Runs are ordinary Runs of a grid of one size, so a Run that was trained before, by tuning or not, is not
trained again. Values are set where nothing else in the study overrides them, and have three digits: two suggestions
that differ by less are one trial.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from harness.common.validation import validate
from harness.record.registry import ResolvedStudy, text_of, trials_name
from harness.record.root import Root
from harness.study.grid import CorpusView, expand, view_corpus
from harness.study.run import branch_step
from harness.study.schema import ModelPatch, Study, StudyTraining, TextChoice
from harness.study.tune import Dimension, Tune, rounded
from ssmttm.errors import InputError
from ssmttm.model.flops import parameter_count

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RATE = "training.optimiser.lr"
ROOMS: Mapping[str, Any] = {"training": StudyTraining, "model": ModelPatch, "text": TextChoice}
"""Parts of a study whose keys decide a result that trials can be compared by."""
FIXED = frozenset({"training.eval_clips", "text.encoder", "text.fingerprint"})
"""Keys below them that no search changes: the yardstick, and the encoder, whose identity is found once a study."""
Values = dict[str, Any]
"""A trial's values by full key."""


@dataclass(frozen=True)
class SearchCase:
    """One architecture at one size, which has a search of its own."""

    architecture: str
    size: str
    n_params: int
    d_model: int
    name: str
    """Of its search in Optuna's record: study, case, and a digest of what decides a trial besides the values.

    The digest holds the choices too.
    """


class Space:
    """A study's search: its cases, its searched keys, and the trial that stands for some values in a case.

    Raises InputError for every mistake that can be seen before anything is trained.
    """

    def __init__(self, study: Study, root: Root, where: str) -> None:
        if study.tune is None:
            raise InputError(f"{where}: tune: is missing; say which sizes to tune and what to search there")
        self.study, self.root, self.where = study, root, where
        self.tune: Tune = study.tune
        self.dimensions = self._dimensions()
        self.iterations = self.tune.iterations or study.grid.iterations[0]
        self.corpus: CorpusView = view_corpus(study, where)
        self.text = text_of(study, root, self.corpus, where)
        if study.uses_tuned and not self.searches_rate:
            raise InputError(
                f"{where}: lr: tuned: is what tuning is to find; search {RATE}, or give a number"
            )
        self._check_pruning()

    @cached_property
    def cases(self) -> tuple[SearchCase, ...]:
        """Every architecture at every searched size, in the study's order."""
        return tuple(
            self.describe(architecture, size)
            for architecture in self.study.grid.architectures
            for size in self.study.grid.sizes
            if size in self.tune.sizes
        )

    @property
    def searches_rate(self) -> bool:
        """True if the learning rate is among the searched keys."""
        return RATE in self.dimensions

    def trial(self, architecture: str, size: str, values: Values) -> ResolvedStudy:
        """The study of one trial, a Run a seed; raises InputError where the values make none."""
        study = self._variant(architecture, size, values)
        points = tuple(expand(study, self.corpus, self.text, self.where))
        return ResolvedStudy(study, self.root, self.corpus, self.text, points, self.where)

    def corner(self, *, high: bool = False) -> Values:
        """The values at one end of every dimension."""
        return {key: _ends(one)[-1 if high else 0] for key, one in self.dimensions.items()}

    def distributions(self) -> dict[str, BaseDistribution]:
        """The dimensions in Optuna's words."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        def told(key: str, one: Dimension) -> BaseDistribution:
            if one.choices is not None:
                return CategoricalDistribution(one.choices)
            kind = IntDistribution if _is_whole(key) else FloatDistribution
            return kind(one.low, one.high, log=one.log)

        return {key: told(key, one) for key, one in self.dimensions.items()}

    def values(self, suggested: Mapping[str, Any]) -> Values:
        """Values to train for a suggestion, in the study's order of keys: of a range three digits, never beyond it."""

        def told(one: Dimension, value: Any) -> Any:
            is_round = one.choices is None and isinstance(value, float)
            return min(one.high, max(one.low, rounded(value))) if is_round else value

        return {key: told(one, suggested[key]) for key, one in self.dimensions.items()}

    def design(self, count: int, name: str) -> list[Values]:
        """Values that fill the space evenly, each dimension cut into `count` strata and each stratum met once.

        A Latin hypercube (McKay, Beckman and Conover 1979), the same whenever it is asked for under one name.
        """
        import random

        chance = random.Random(name)  # noqa: S311 - nothing secret
        columns = {}
        for key, one in self.dimensions.items():
            places = [(stratum + chance.random()) / count for stratum in range(count)]
            chance.shuffle(places)
            columns[key] = [self._at(key, one, place) for place in places]
        return [{key: column[row] for key, column in columns.items()} for row in range(count)]

    def _at(self, key: str, one: Dimension, place: float) -> Any:
        if one.choices is not None:
            return one.choices[int(place * len(one.choices))]
        low, high = (math.log(one.low), math.log(one.high)) if one.log else (one.low, one.high)
        value = low + place * (high - low)
        value = min(one.high, max(one.low, math.exp(value) if one.log else value))
        return round(value) if _is_whole(key) else value

    def _dimensions(self) -> dict[str, Dimension]:
        found: dict[str, Dimension] = {}
        for given, one in self.tune.search.items():
            key = f"training.{given}" if given.split(".")[0] in StudyTraining.model_fields else given
            place = f"{self.where}: tune.search.{given}"
            room, *path = key.split(".")
            if room not in ROOMS or not path or key in FIXED:
                raise InputError(
                    f"{place}: is no key that can be searched; those below training, model and text can, but for what "
                    "the loss is measured on and which text encoder there is"
                )
            _check_key(key, place)
            if key in found:
                raise InputError(f"{place}: is searched twice")
            if _is_whole(key) and not all(
                isinstance(end, int) for end in (one.low, one.high, *(one.choices or ())) if end is not None
            ):
                raise InputError(f"{place}: is a whole number, and so are the ends of its range")
            found[key] = one
        return found

    def _check_pruning(self) -> None:
        tune, tracking = self.tune, self.study.tracking
        if tune.pruner == "none":
            return
        last = branch_step(self.study.training.schedule, self.iterations)
        if tracking.eval_every is None or tracking.eval_every > last:
            every = "null" if tracking.eval_every is None else tracking.eval_every
            raise InputError(
                f"{self.where}: tune.pruner: {tune.pruner}: judges losses on the way, and with tracking.eval_every: "
                f"{every} a run of {self.iterations} iterations has none in its {last} steps before the decay"
            )

    def describe(self, architecture: str, size: str) -> SearchCase:
        """A size of the grid, searched or not; raises InputError where an end of a range or a choice makes no run."""
        low = self.corner()
        for key, one in self.dimensions.items():
            for value in _ends(one):
                self.trial(architecture, size, low | {key: value})
        same = self.trial(architecture, size, self.corner(high=True)).points[0].run.canonical()
        for key in self.dimensions:
            _drop(same, key.removeprefix("training.").replace("text.", "model.text.").split("."))
        # To Optuna another list of choices is another search; a range may move.
        kinds = {key: list(one.choices or [one.log]) for key, one in self.dimensions.items()}
        facts = [same, list(self.tune.seeds), kinds]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        # The study's own model, which `lr: tuned` is to be recognised by: searched keys may change its size.
        rate = {key: value for key, value in low.items() if key == RATE}
        model = self.trial(architecture, size, rate).points[0].run.model
        return SearchCase(
            architecture,
            size,
            parameter_count(model).n_params,
            model.d_model,
            f"{self.study.name}/{architecture}/{size}/{digest}",
        )

    def _variant(self, architecture: str, size: str, values: Values) -> Study:
        fields = self.study.model_dump(mode="json", exclude_unset=True)
        fields.pop("tune")
        own = fields["grid"]["architectures"][architecture] or {}
        own.pop("iterations", None)
        patch = own.get("sizes", {}).get(size) or {}
        own["sizes"] = {size: patch}
        for key, value in values.items():
            head, *path = key.split(".")
            # Where an architecture or a size may say something for itself, a trial says it last.
            of_size = head == "model" or path[0] == "optimiser"
            _put(patch if of_size else fields, path if of_size else [head, *path], value)
        fields["grid"] = {
            "architectures": {architecture: own},
            "sizes": {size: fields["grid"]["sizes"][size]},
            "iterations": [self.iterations],
            "seeds": list(self.tune.seeds),
        }
        variant = validate(Study, fields, f"{self.where}: tune ({architecture}, {size})")
        return variant.model_copy(update={"name": trials_name(self.study.name)})


def _ends(one: Dimension) -> tuple[Any, ...]:
    """Every choice, or both ends of a range."""
    return one.choices or (one.low, one.high)


def _field(key: str) -> Any:
    """The field of a study's models that a full key names, or None."""
    room, *path = key.split(".")
    here: Any = ROOMS[room]
    field = None
    for name in path:
        field = getattr(here, "model_fields", {}).get(name)
        if field is None:
            return None
        here = field.annotation
    return field


def _is_whole(key: str) -> bool:
    """True if a key holds a whole number."""

    def kinds(annotation: Any) -> set[Any]:
        parts = get_args(annotation)
        return set().union(*map(kinds, parts)) if parts else {annotation}

    held = kinds(_field(key).annotation)
    return int in held and float not in held


def _check_key(key: str, place: str) -> None:
    room, *path = key.split(".")
    for depth, name in enumerate(path):
        above = _field(".".join([room, *path[:depth]])) if depth else None
        names: Sequence[str] = list(getattr(above.annotation if above else ROOMS[room], "model_fields", {}))
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{place}: unknown key{hint}")


def _put(fields: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        if fields.get(part) is None:
            fields[part] = {}
        fields = fields[part]
    fields[path[-1]] = value


def _drop(fields: Any, path: Sequence[str]) -> None:
    for part in path[:-1]:
        fields = fields.get(part, {})
    fields.pop(path[-1], None)
