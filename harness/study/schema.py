"""A Study: the YAML file a user writes, validated before anything is done with it; grid.py makes Runs of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)

from harness.common.validation import read_yaml, read_yaml_value, usable_path, validate
from harness.study.ladder import rungs
from harness.study.run import (
    Count,
    Digest,
    Frozen,
    Optimiser,
    Positive,
    Training,
    WholeNumber,
    steps_before_decay,
)
from harness.study.tune import Tune
from ssmttm.errors import InputError
from ssmttm.model.architecture import Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.model.sizes import TOLERANCE


def _patch(of: type[Frozen] | type[ModelConfig], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a model, each optional: what an entry of the grid may change."""
    return {
        name: (field.rebuild_annotation() | None, None)
        for name, field in of.model_fields.items()
        if name not in leave_out
    }


TUNED = "tuned"
"""Stands in a study for a learning rate that `ssmscale tune` found; the grid puts its number there."""


def _rate_or_tuned(value: Any, validate_rate: Callable[[Any], float]) -> Any:
    return value if value == TUNED else validate_rate(value)


LearningRate = Annotated[Positive, WrapValidator(_rate_or_tuned), PlainSerializer(lambda rate: rate)]
StudyOptimiser: Any = create_model("StudyOptimiser", __base__=Optimiser, lr=(LearningRate, ...))
"""A Run's optimiser, whose learning rate a study may leave to what was tuned."""
OptimiserPatch: Any = create_model("OptimiserPatch", __base__=Frozen, **_patch(StudyOptimiser))
"""Optimiser keys an architecture or a size sets for itself."""

_FROM_ELSEWHERE = ("architecture", "text", "n_codebooks", "codebook_size")
ModelPatch: Any = create_model("ModelPatch", __base__=Frozen, **_patch(ModelConfig, _FROM_ELSEWHERE))
"""Model keys given once for the study, for an architecture or for a size; the last of these wins."""

Flops = Annotated[float, Field(ge=1e6, le=1e24)]
"""Peak operations a second of a device."""


class ResourceChoice(Frozen):
    """Resources asked for by hand; null lets the harness choose."""

    ranks: Count | None = 1
    """GPUs (or CPU ranks) of a Series; null takes the fewest on which it fits and ends within a job's time limit."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """Null is 0 where ranks are given, and the lowest that fits where they are chosen."""
    micro_batch: Count | None = None
    threads: Count | None = None
    activation_checkpointing: bool | None = None
    """True if blocks are computed again in the backward pass: less memory, about a third more work, the same losses.
    Null is false, unless ranks are chosen and nothing fits without."""
    jobs: Count | None = None
    """Series trained at once by the local dispatcher."""
    checkpoint_every: Count = 1000
    keep_last: Count = 1
    """Newest periodic checkpoints kept besides branch points: the older ones are what a damaged one falls back on."""
    keep_best: bool = False
    """True if the checkpoint with the lowest held-out loss is kept too; needs tracking.eval_every to have any."""
    peak_flops: Flops | None = None


_OF_THE_WHOLE_STUDY = ("jobs", "checkpoint_every", "keep_last", "keep_best", "peak_flops")
ResourcePatch: Any = create_model(
    "ResourcePatch", __base__=Frozen, **_patch(ResourceChoice, _OF_THE_WHOLE_STUDY)
)
"""Resources a size asks for itself: what is too large for one GPU takes several."""

Parameters = Annotated[float, Field(ge=1.0, le=1e13)]
"""A number of parameters asked for."""


class SizeKeys(Frozen):
    """Keys a size may give instead of its blocks or its width, and the published model it stands for."""

    n_params: Parameters | None = None
    """Parameters each architecture comes as near to as it can."""
    aspect: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """d_model over n_blocks."""
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = TOLERANCE
    """Distance from n_params at which the nearest model may be, as a share."""
    reference_n_params: Parameters | None = None
    """Parameters of the published model that a size stands for: shown beside its own, and nothing else."""


SizePatch: Any = create_model(
    "SizePatch",
    __base__=ModelPatch,
    **_patch(SizeKeys),
    optimiser=(OptimiserPatch | None, None),
    resources=(ResourcePatch | None, None),
)
"""A size: its model keys, optimiser keys where they go with size, and resources of its own."""


def _rising(value: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in pairwise(value)):
        raise ValueError("iterations must rise from one to the next")
    return value


Iterations = Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_rising)]
"""Lengths of the runs of a size, shortest first."""


class ArchitecturePatch(Frozen):
    """Changes of one architecture."""

    model: ModelPatch = ModelPatch()
    optimiser: OptimiserPatch = OptimiserPatch()
    sizes: dict[str, SizePatch] = {}
    """Changes to the study's sizes under this architecture alone, by the size's name."""
    iterations: Iterations | None = None
    """Instead of the grid's."""


class Replicates(Frozen):
    """Further seeds for some sizes: noise between seeds, measured where it is cheap."""

    sizes: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[WholeNumber, ...], Field(min_length=1)]


class Grid(Frozen):
    """Architecture x size x iterations x seed."""

    architectures: Annotated[dict[Architecture, ArchitecturePatch], Field(min_length=1)]
    sizes: Annotated[dict[str, SizePatch], Field(min_length=1)]
    iterations: Iterations
    seeds: Annotated[tuple[WholeNumber, ...], Field(min_length=1)] = (0,)
    replicates: tuple[Replicates, ...] = ()

    @field_validator("architectures", mode="before")
    @classmethod
    def _bare_names_change_nothing(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: {} if patch is None else patch for name, patch in value.items()}
        return value

    @field_validator("sizes", mode="before")
    @classmethod
    def _lists_make_ladders(cls, value: Any) -> Any:
        return rungs(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _names_are_known(self) -> Grid:
        places = [
            (f"replicates.{i}.sizes", name) for i, extra in enumerate(self.replicates) for name in extra.sizes
        ]
        for architecture, patch in self.architectures.items():
            places += [(f"architectures.{architecture}.sizes", name) for name in patch.sizes]
        for key, name in places:
            if name not in self.sizes:
                raise ValueError(f"{key}: {name!r} is not one of the sizes {', '.join(self.sizes)}")
        return self

    @property
    def n_runs(self) -> int:
        """Number of Runs the grid stands for."""
        seeds = sum(len(self.seeds_of(size)) for size in self.sizes)
        return seeds * sum(len(self.iterations_of(name)) for name in self.architectures)

    def iterations_of(self, architecture: Architecture) -> tuple[int, ...]:
        """Iterations of every run of an architecture's sizes: its own, else the grid's."""
        return self.architectures[architecture].iterations or self.iterations

    def seeds_of(self, size: str) -> list[int]:
        """Every seed a size is trained with, each once."""
        extra = [seed for more in self.replicates if size in more.sizes for seed in more.seeds]
        return list(dict.fromkeys([*self.seeds, *extra]))


PlainPath = Annotated[Path, AfterValidator(usable_path)]
"""A path that may be asked for."""


class CorpusFacts(Frozen):
    """Facts of a corpus that is not on this machine, for planning; once it is, it must agree with all but `clips`."""

    n_codebooks: Count
    codebook_size: Count
    frames: Count
    clips: Count
    """Clips of the training split, as many as are expected: what a corpus has counts, and a difference is noted."""


class CorpusChoice(Frozen):
    """The corpus, and what the study expects of it."""

    path: PlainPath
    codec: str | None = None
    """Name the corpus's codec must have."""
    frames: Count | None = None
    """Frames of a training sequence; null takes whole clips."""
    facts: CorpusFacts | None = None


class TextChoice(Frozen):
    """The text encoder: bytes (trained with the model), or a frozen one by hub name or local folder."""

    encoder: Annotated[str, AfterValidator(usable_path)] = "bytes"
    dim: Count = 64
    """Width of the text embedding; of a frozen encoder, its hidden size."""
    patch: Annotated[Count, Field(ge=2)] = 8
    max_positions: Count = 64
    fingerprint: Digest | None = None
    """A frozen encoder's fingerprint, where its weights are not on this machine."""

    @field_validator("patch")
    @classmethod
    def _patches_are_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("is odd: choose an even number of bytes, such as 8")
        return value


class StudyTraining(Training):
    """The same as a study gives it: its learning rate may be left to what was tuned."""

    optimiser: StudyOptimiser


class Tracking(Frozen):
    """Place and frequency of progress reports; no part of identity."""

    uri: str | None = None
    """MLflow tracking URI; null is a SQLite database in ROOT."""
    log_every: Count = 10
    eval_every: Count | None = None

    @field_validator("uri")
    @classmethod
    def _names_a_server_or_a_database(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://.", value):
            raise ValueError(
                "is no tracker's address, such as http://127.0.0.1:5000 or sqlite:////data/mlflow.db"
            )
        return value


LogSd = Annotated[float, Field(ge=0.0, le=1.0)]
"""A standard deviation of log loss: 0.004 is 0.4 per cent of a loss."""


class NoiseChoice(Frozen):
    """Scatter of losses about their law."""

    series: LogSd
    """Shared by the runs of a trunk."""
    run: LogSd
    """Of each run alone."""


class DesignChoice(Frozen):
    """Assumptions while the grid is planned; no part of any Run."""

    law: str | None = None
    prior: dict[Architecture, dict[str, float]] = {}
    """Parameters by architecture, as `ssmscale fit` prints them."""
    noise: NoiseChoice | None = None


class Study(Frozen):
    """The validated YAML."""

    name: str
    root: PlainPath | None = None
    corpus: CorpusChoice
    text: TextChoice = TextChoice()
    model: ModelPatch = ModelPatch()
    grid: Grid
    training: StudyTraining
    tracking: Tracking = Tracking()
    resources: ResourceChoice = ResourceChoice()
    design: DesignChoice = DesignChoice()
    tune: Tune | None = None

    @property
    def uses_tuned(self) -> bool:
        """True if some learning rate is left to what was tuned."""
        patches: list[Any] = [*self.grid.sizes.values()]
        for own in self.grid.architectures.values():
            patches += [own, *own.sizes.values()]
        chosen = [self.training.optimiser, *(getattr(patch, "optimiser", None) for patch in patches)]
        return any(getattr(optimiser, "lr", None) == TUNED for optimiser in chosen)

    def resources_of(self, architecture: str, size: str) -> ResourceChoice:
        """Resources of one size under one architecture: the study's choice and its own changes to it."""
        changes = merged(*(getattr(patch, "resources", None) for patch in self._patches(architecture, size)))
        return self.resources.model_copy(update=changes)

    def size_keys_of(self, architecture: str, size: str) -> SizeKeys:
        """Size keys of one size under one architecture; null takes back what was given before."""
        said = merged(*self._patches(architecture, size))
        return SizeKeys(**{key: said[key] for key in SizeKeys.model_fields if said.get(key) is not None})

    def _patches(self, architecture: str, size: str) -> tuple[Any, Any]:
        own = self.grid.architectures[Architecture(architecture)]
        return self.grid.sizes[size], own.sizes.get(size)

    @field_validator("name")
    @classmethod
    def _name_is_a_plain_word(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
            raise ValueError(
                "a name has letters, digits, '.', '_' and '-', begins with a letter or digit, at most 64"
            )
        return value

    @model_validator(mode="after")
    def _tuned_sizes_are_known(self) -> Study:
        for name in self.tune.sizes if self.tune else ():
            if name not in self.grid.sizes:
                raise ValueError(f"tune.sizes: {name!r} is not one of the sizes {', '.join(self.grid.sizes)}")
        return self

    @model_validator(mode="after")
    def _warmup_ends_before_the_first_branch(self) -> Study:
        schedule = self.training.schedule
        for name, own in self.grid.architectures.items():
            shortest = self.grid.iterations_of(name)[0]
            key = "grid.iterations" if own.iterations is None else f"grid.architectures.{name}.iterations"
            stable_end = steps_before_decay(schedule, shortest)
            if schedule.warmup > stable_end:
                raise ValueError(
                    f"training.schedule.warmup: {schedule.warmup}: longer than the {stable_end} steps before the decay "
                    f"of the shortest run, {key}.0 = {shortest}"
                )
        return self


def load_study(path: Path, changes: Sequence[str] = ()) -> Study:
    """Read a study and apply `key=value` changes; raises InputError for every mistake in it at once."""
    fields = read_yaml(path)
    for change in changes:
        _apply(fields, change)
    return validate(Study, fields, str(path))


def _apply(fields: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set {change}: is not key=value, such as training.batch=16")
    here: Any = fields
    for part in parts[:-1]:
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here.get(part) if isinstance(here, dict) else None
    if not isinstance(here, dict):
        raise InputError(f"--set {change}: {parts[-2]!r} holds no keys")
    here[parts[-1]] = read_yaml_value(text, f"--set {change}")


def merged(*patches: Any) -> dict[str, Any]:
    """Fields that patches set, the last of them winning."""
    fields: dict[str, Any] = {}
    for patch in patches:
        if patch is not None:
            fields |= patch.model_dump(exclude_unset=True)
    return fields
