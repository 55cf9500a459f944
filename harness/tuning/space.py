"""A study's search: its cases, its keys, and a trial as the study of one case with given values of the searched keys.

A trial's Runs are ordinary Runs of a grid of one size, so a Run that was trained before, by tuning or not, is not
trained again. A trial's values override all others in the study. They have three digits, so suggestions that differ by
less are one trial.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import random
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

Values = dict[str, Any]
"""A trial's values by full key."""
RATE = "training.optimiser.lr"
SECTIONS: Mapping[str, Any] = {"training": StudyTraining, "model": ModelPatch, "text": TextChoice}
"""Sections of a study whose keys can be searched."""
FIXED = frozenset({"training.eval_clips", "text.encoder", "text.fingerprint"})
"""Keys in them that cannot: the clips of the held-out loss, and the encoder, which is identified once a study."""


@dataclass(frozen=True)
class SearchCase:
    """One architecture at one size, which has a search of its own."""

    architecture: str
    size: str
    name: str
    """Name of its search in Optuna's storage: study, case, and a digest of all that decides a trial but its values."""
    n_params: int
    d_model: int


class Space:
    """A study's search: its cases, its searched keys, and the trial with given values in a case.

    Raises InputError for every mistake that is visible before training.
    """

    def __init__(self, study: Study, root: Root, where: str) -> None:
        if study.tune is None:
            raise InputError(f"{where}: tune: is missing; give the sizes to tune and the keys to search")
        self.study, self.root, self.where = study, root, where
        self.tune: Tune = study.tune
        self.dimensions = self._dimensions()
        self.iterations = self.tune.iterations or study.grid.iterations[0]
        self.corpus: CorpusView = view_corpus(study, where)
        self.text = text_of(study, root, self.corpus, where)
        if study.uses_tuned and not self.searches_rate:
            raise InputError(
                f"{where}: lr: tuned: has no value before tuning; search {RATE} or give a number"
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
        """Return the study of one trial, a Run a seed; raises InputError where the values are invalid."""
        study = self._variant(architecture, size, values)
        points = tuple(expand(study, self.corpus, self.text, self.where))
        return ResolvedStudy(study, self.root, self.corpus, self.text, points, self.where)

    def corner(self, *, high: bool = False) -> Values:
        """Return the values at one end of every dimension."""
        return {key: _ends(one)[-1 if high else 0] for key, one in self.dimensions.items()}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the dimensions as Optuna's distributions."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {}
        for key, one in self.dimensions.items():
            if one.choices is not None:
                found[key] = CategoricalDistribution(one.choices)
            else:
                kind = IntDistribution if _is_whole(key) else FloatDistribution
                found[key] = kind(one.low, one.high, log=one.log)
        return found

    def values(self, suggested: Mapping[str, Any]) -> Values:
        """Return the values to train for a suggestion, by key in the study's order; floats in a range are rounded."""
        found = {key: suggested[key] for key in self.dimensions}
        for key, one in self.dimensions.items():
            if one.choices is None and isinstance(found[key], float):
                found[key] = min(one.high, max(one.low, rounded(found[key])))
        return found

    def design(self, count: int, name: str) -> list[Values]:
        """Return values that fill the space evenly: each dimension has `count` strata and meets each of them once.

        A Latin hypercube (McKay, Beckman and Conover 1979), the same at every call with one name.
        """
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
            section, *path = key.split(".")
            if section not in SECTIONS or not path or key in FIXED:
                raise InputError(
                    f"{place}: cannot be searched; keys of training, model and text can, except the clips of the "
                    "held-out loss and the text encoder"
                )
            is_whole = _is_whole(key, place)
            if key in found:
                raise InputError(f"{place}: is searched twice")
            if is_whole and not all(isinstance(end, int) for end in _ends(one)):
                raise InputError(f"{place}: is a whole number; its range and choices must be, too")
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
                f"{self.where}: tune.pruner: {tune.pruner}: needs losses on the way, and with tracking.eval_every: "
                f"{every} a run of {self.iterations} iterations has none in its {last} steps before the decay"
            )

    def describe(self, architecture: str, size: str) -> SearchCase:
        """Describe a size of the grid, searched or not; raises InputError if any end or choice is invalid."""
        low = self.corner()
        for key, one in self.dimensions.items():
            for value in _ends(one):
                self.trial(architecture, size, low | {key: value})
        same = self.trial(architecture, size, self.corner(high=True)).points[0].run.canonical()
        for key in self.dimensions:
            _drop(same, key.removeprefix("training.").replace("text.", "model.text.").split("."))
        # Optuna needs a new search for other choices; a range may change.
        kinds = {key: list(one.choices or [one.log]) for key, one in self.dimensions.items()}
        facts = [same, list(self.tune.seeds), kinds]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        # `lr: tuned` looks for the study's own model, whose size searched keys may change.
        rate = {key: value for key, value in low.items() if key == RATE}
        model = self.trial(architecture, size, rate).points[0].run.model
        name = f"{self.study.name}/{architecture}/{size}/{digest}"
        return SearchCase(architecture, size, name, parameter_count(model).n_params, model.d_model)

    def _variant(self, architecture: str, size: str, values: Values) -> Study:
        fields = self.study.model_dump(mode="json", exclude_unset=True)
        fields.pop("tune")
        own = fields["grid"]["architectures"][architecture] or {}
        own.pop("iterations", None)
        patch = own.get("sizes", {}).get(size) or {}
        own["sizes"] = {size: patch}
        for key, value in values.items():
            head, *path = key.split(".")
            # A size's keys override all others, where it may have them.
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
    """Return every choice, or both ends of a range."""
    return one.choices or (one.low, one.high)


def _annotation(key: str, place: str) -> Any:
    """Return the annotation of the field that a full key names; raises InputError if there is no such field."""
    section, *path = key.split(".")
    here: Any = SECTIONS[section]
    for name in path:
        known = getattr(here, "model_fields", {})
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"{place}: unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))
        here = known[name].annotation
    return here


def _is_whole(key: str, place: str = "") -> bool:
    """True if a key holds a whole number; raises what `_annotation` raises."""

    def kinds(annotation: Any) -> set[Any]:
        parts = get_args(annotation)
        return set().union(*map(kinds, parts)) if parts else {annotation}

    held = kinds(_annotation(key, place))
    return int in held and float not in held


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
