"""A Study: the schema of the YAML file a user writes; grid.py expands it to Runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)

from harness.common.address import has_password, redact
from harness.common.validation import Address, PlainPath, read_yaml, read_yaml_value, usable_path, validate
from harness.study.ladder import replace_ladders
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
    """Return the fields of a model as optional ones, which an entry of the grid may set."""
    return {
        name: (field.rebuild_annotation() | None, None)
        for name, field in of.model_fields.items()
        if name not in leave_out
    }


TUNED = "tuned"
"""Value of a learning rate that the grid replaces with the one `ssmscale tune` found."""


LearningRate = Annotated[
    Positive,
    WrapValidator(lambda value, validate_rate: value if value == TUNED else validate_rate(value)),
    PlainSerializer(lambda rate: rate),
]
StudyOptimiser: Any = create_model("StudyOptimiser", __base__=Optimiser, lr=(LearningRate, ...))
"""A Run's optimiser whose learning rate may be `tuned`."""
OptimiserPatch: Any = create_model("OptimiserPatch", __base__=Frozen, **_patch(StudyOptimiser))
"""Optimiser keys of an architecture or a size."""

_NO_MODEL_KEYS = ("architecture", "text", "n_codebooks", "codebook_size")
ModelPatch: Any = create_model("ModelPatch", __base__=Frozen, **_patch(ModelConfig, _NO_MODEL_KEYS))
"""Model keys of the study, an architecture or a size; the last of these wins."""


class ResourceChoice(Frozen):
    """Resources of a Series; the harness chooses those that are null."""

    ranks: Count | None = 1
    """GPUs (or CPU ranks) of a Series; null takes the fewest on which it fits and ends within a job's time limit."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """Null is 0 if ranks are given, else the lowest that fits."""
    micro_batch: Count | None = None
    threads: Count | None = None
    """CPU threads of a rank. Null is 1, and on GPUs the rank's share of its node's cores."""
    activation_checkpointing: bool | None = None
    """True if the backward pass computes blocks again: less memory, a third more work, the same losses.
    Null is false, unless ranks are null too and nothing fits otherwise."""
    compile: bool | None = None
    """True to compile blocks by torch.compile: faster, with losses equal to rounding. Null compiles on GPUs."""
    jobs: Count | None = None
    """Series trained at once by the local dispatcher."""
    checkpoint_every: Count = 1000
    keep_last: Count = 1
    """Number of periodic checkpoints kept besides branch points; the older ones replace a damaged one."""
    keep_best: bool = False
    """True if the checkpoint with the lowest held-out loss is kept too; requires tracking.eval_every."""
    stall_seconds: Positive = 300.0
    """A run of which nothing moves for so long, and for 20 times its usual pause, is ended and started again."""
    peak_flops: Annotated[float, Field(ge=1e6, le=1e24)] | None = None


_OF_THE_WHOLE_STUDY = ("jobs", "checkpoint_every", "keep_last", "keep_best", "stall_seconds", "peak_flops")
ResourcePatch: Any = create_model(
    "ResourcePatch", __base__=Frozen, **_patch(ResourceChoice, _OF_THE_WHOLE_STUDY)
)
"""Resources of a size: one that is too large for one GPU takes several."""
Parameters = Annotated[float, Field(ge=1.0, le=1e13)]


class SizeKeys(Frozen):
    """Keys that a size may give instead of its blocks or its width."""

    n_params: Parameters | None = None
    """Parameters that each architecture approximates as closely as it can."""
    aspect: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """d_model over n_blocks."""
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = TOLERANCE
    """Largest relative distance of the nearest model from n_params."""
    reference_n_params: Parameters | None = None
    """Parameters of the published model that the size follows, only shown beside its own."""


SizePatch: Any = create_model(
    "SizePatch",
    __base__=ModelPatch,
    **_patch(SizeKeys),
    optimiser=(OptimiserPatch | None, None),
    resources=(ResourcePatch | None, None),
)
"""A size: its model keys, optimiser keys and resources."""


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
    """Changes to the study's sizes for this architecture, by the size's name."""
    iterations: Iterations | None = None


class Replicates(Frozen):
    """More seeds for some sizes, to measure the noise between seeds where it is cheap."""

    sizes: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[WholeNumber, ...], Field(min_length=1)]


_Patch = Annotated[ArchitecturePatch, BeforeValidator(lambda patch: {} if patch is None else patch)]


class Grid(Frozen):
    """Architecture x size x iterations x seed."""

    architectures: Annotated[dict[Architecture, _Patch], Field(min_length=1)]
    sizes: Annotated[dict[str, SizePatch], Field(min_length=1), BeforeValidator(replace_ladders)]
    iterations: Iterations
    seeds: Annotated[tuple[WholeNumber, ...], Field(min_length=1)] = (0,)
    replicates: tuple[Replicates, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Grid:
        for i, extra in enumerate(self.replicates):
            self.check_sizes(f"replicates.{i}.sizes", extra.sizes)
        for architecture, patch in self.architectures.items():
            self.check_sizes(f"architectures.{architecture}.sizes", patch.sizes)
        return self

    def check_sizes(self, key: str, names: Iterable[str]) -> None:
        """Raise ValueError beginning with `key` for a name that is not one of the sizes."""
        for name in names:
            if name not in self.sizes:
                raise ValueError(f"{key}: {name!r} is not one of the sizes {', '.join(self.sizes)}")

    @property
    def n_runs(self) -> int:
        """Number of Runs in the grid."""
        seeds = sum(len(self.seeds_of(size)) for size in self.sizes)
        return seeds * sum(len(self.iterations_of(name)) for name in self.architectures)

    def iterations_of(self, architecture: Architecture) -> tuple[int, ...]:
        """Return the lengths of an architecture's runs: its own, else the grid's."""
        return self.architectures[architecture].iterations or self.iterations

    def seeds_of(self, size: str) -> list[int]:
        """Return every seed of a size once."""
        extra = [seed for more in self.replicates if size in more.sizes for seed in more.seeds]
        return list(dict.fromkeys([*self.seeds, *extra]))


class CorpusFacts(Frozen):
    """Facts for planning with a corpus that is not on this machine; the corpus must agree with all but `clips`."""

    n_codebooks: Count
    codebook_size: Count
    frames: Count
    clips: Count
    """Expected number of clips in the training split; the plan notes a difference."""


class CorpusChoice(Frozen):
    """The corpus and the properties that the study expects of it."""

    path: PlainPath
    codec: str | None = None
    """Name that the corpus's codec must have."""
    frames: Count | None = None
    """Frames of a training sequence; null takes whole clips."""
    facts: CorpusFacts | None = None


class TextChoice(Frozen):
    """The text encoder: bytes (trained with the model), or a frozen one by hub name or local folder."""

    encoder: Annotated[str, AfterValidator(usable_path)] = "bytes"
    dim: Count = 64
    """Width of the text embedding: the hidden size of a frozen encoder."""
    patch: Annotated[Count, Field(ge=2, multiple_of=2)] = 8
    max_positions: Count = 64
    fingerprint: Digest | None = None
    """Fingerprint of a frozen encoder whose weights are not on this machine."""


class StudyTraining(Training):
    """Training whose learning rate may be `tuned`."""

    optimiser: StudyOptimiser


class Tracking(Frozen):
    """Address and frequency of progress reports; no part of identity."""

    uri: Address | None = None
    """MLflow tracking URI; null is a SQLite database in ROOT."""
    log_every: Count = 10
    eval_every: Count | None = None

    @field_validator("uri")
    @classmethod
    def _names_a_server_or_a_database(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://.", value):
            raise ValueError(
                "is not a tracking URI, such as http://127.0.0.1:5000 or sqlite:////data/mlflow.db"
            )
        return value


LogSd = Annotated[float, Field(ge=0.0, le=1.0)]
"""A standard deviation of log loss: 0.004 is 0.4 per cent of a loss."""


class NoiseChoice(Frozen):
    """Scatter of losses about their law."""

    series: LogSd
    """Scatter shared by the runs of a trunk."""
    run: LogSd
    """Scatter of each run."""


class DesignChoice(Frozen):
    """Assumptions for planning the grid; no part of any Run."""

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
        """True if some learning rate is `tuned`."""
        patches: list[Any] = [*self.grid.sizes.values()]
        for own in self.grid.architectures.values():
            patches += [own, *own.sizes.values()]
        chosen = [self.training.optimiser, *(getattr(patch, "optimiser", None) for patch in patches)]
        return any(getattr(optimiser, "lr", None) == TUNED for optimiser in chosen)

    def resources_of(self, architecture: str, size: str) -> ResourceChoice:
        """Return the resources of a size of an architecture: the study's with the size's changes."""
        changes = merged(*(patch.resources for patch in self.patches_of(architecture, size)))
        return self.resources.model_copy(update=changes)

    def size_keys_of(self, architecture: str, size: str) -> SizeKeys:
        """Return the size keys of a size of an architecture; null removes a key that the size had."""
        keys = merged(*self.patches_of(architecture, size))
        return SizeKeys(**{key: keys[key] for key in SizeKeys.model_fields if keys.get(key) is not None})

    def patches_of(self, architecture: str, size: str) -> tuple[Any, Any]:
        """Return the patch of a size and the architecture's own patch of it."""
        own = self.grid.architectures[Architecture(architecture)]
        return self.grid.sizes[size], own.sizes.get(size, SizePatch())

    @field_validator("name")
    @classmethod
    def _name_is_a_plain_word(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
            raise ValueError(
                "a name has at most 64 letters, digits, '.', '_' and '-', and begins with a letter or digit"
            )
        return value

    @model_validator(mode="after")
    def _tuned_sizes_are_known(self) -> Study:
        self.grid.check_sizes("tune.sizes", self.tune.sizes if self.tune else ())
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


LOGIN_ELSEWHERE = (
    "holds a password, which everyone who reads the study would have; write the address without it, and give the "
    "password in ~/.pgpass, by MLFLOW_TRACKING_PASSWORD, or with the whole address under `addresses` in "
    "~/.config/ssmscale/settings.yaml"
)


def load_study(path: Path, changes: Sequence[str] = ()) -> Study:
    """Read a study and apply `key=value` changes; raises one InputError with all its mistakes."""
    fields = read_yaml(path)
    options = {}
    for change in changes:
        options[_apply(fields, change)] = f"--set {change}"
    study = validate(Study, fields, str(path), options)
    addresses = {"tracking.uri": study.tracking.uri, "tune.storage": study.tune and study.tune.storage}
    for key, address in addresses.items():
        if address and has_password(address):
            where = "--set" if key in options else path
            raise InputError(f"{where}: {key}: {redact(address)}: {LOGIN_ELSEWHERE}")
    return study


def _apply(fields: dict[str, Any], change: str) -> str:
    """Apply a change and return the key that it sets."""
    key, equals, text = change.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set {change}: must be key=value, such as training.batch=16")
    here: Any = fields
    for part in parts[:-1]:
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here.get(part) if isinstance(here, dict) else None
    if not isinstance(here, dict):
        raise InputError(f"--set {change}: {parts[-2]!r} has no keys")
    here[parts[-1]] = read_yaml_value(text, f"--set {change}")
    return ".".join(parts)


def merged(*patches: Any) -> dict[str, Any]:
    """Return the fields that patches set; a later patch replaces an earlier one's."""
    fields: dict[str, Any] = {}
    for patch in patches:
        if patch is not None:
            fields |= patch.model_dump(exclude_unset=True)
    return fields
