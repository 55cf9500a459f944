"""A Study: the YAML file a user writes, validated, and the grid of Runs it stands for.

Everything is checked before anything is written. What the grid needs of a corpus (codebooks, clip length,
fingerprint) is read from its manifest, or taken from `corpus.facts` where the corpus is elsewhere; then runs can
be planned and costed, but have no identity yet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, create_model, field_validator, model_validator

from harness.run import (
    RECIPE_VERSION,
    Count,
    Digest,
    Frozen,
    Optimiser,
    Precision,
    Regularisation,
    Run,
    Schedule,
    ScheduleKind,
    WholeNumber,
)
from harness.training.schedule import branch_step
from harness.validation import validate
from harness.yaml_file import read_yaml, read_yaml_value
from ssmttm.config import Architecture, ModelConfig, SubLayer, TextConfig
from ssmttm.corpus.manifest import Manifest, load_manifest
from ssmttm.errors import InputError

UNKNOWN_FINGERPRINT = "0" * 64
"""Stands for a corpus or an encoder that is not here: such Runs are planned and never trained."""


def _patch(of: type[Frozen] | type[ModelConfig], leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a model, each optional: what an entry of the grid may change."""
    return {
        name: (field.rebuild_annotation() | None, None)
        for name, field in of.model_fields.items()
        if name not in leave_out
    }


OptimiserPatch: Any = create_model("OptimiserPatch", __base__=Frozen, **_patch(Optimiser))
"""Optimiser keys an architecture or a size sets for itself."""

_FROM_ELSEWHERE = ("architecture", "text", "n_codebooks", "codebook_size")
ModelPatch: Any = create_model("ModelPatch", __base__=Frozen, **_patch(ModelConfig, _FROM_ELSEWHERE))
"""Model keys given once for the study, for an architecture or for a size; the last of these wins."""

SizePatch: Any = create_model("SizePatch", __base__=ModelPatch, optimiser=(OptimiserPatch | None, None))
"""A size: its model keys, and optimiser keys where they go with size."""


class ArchitecturePatch(Frozen):
    """What one architecture has for itself."""

    model: ModelPatch = ModelPatch()
    optimiser: OptimiserPatch = OptimiserPatch()
    sizes: dict[str, SizePatch] = {}
    """Changes to the study's sizes under this architecture alone, by the size's name."""


class Replicates(Frozen):
    """Further seeds for some sizes: noise between seeds, measured where it is cheap."""

    sizes: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[WholeNumber, ...], Field(min_length=1)]


class Grid(Frozen):
    """Architecture x size x iterations x seed."""

    architectures: Annotated[dict[Architecture, ArchitecturePatch], Field(min_length=1)]
    sizes: Annotated[dict[str, SizePatch], Field(min_length=1)]
    iterations: Annotated[tuple[Count, ...], Field(min_length=1)]
    seeds: Annotated[tuple[WholeNumber, ...], Field(min_length=1)] = (0,)
    replicates: tuple[Replicates, ...] = ()

    @field_validator("architectures", mode="before")
    @classmethod
    def _bare_names_change_nothing(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: {} if patch is None else patch for name, patch in value.items()}
        return value

    @field_validator("iterations")
    @classmethod
    def _iterations_rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in pairwise(value)):
            raise ValueError("iterations must rise from one to the next")
        return value

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
        """How many Runs the grid stands for."""
        seeds = sum(len(self.seeds_of(size)) for size in self.sizes)
        return len(self.architectures) * seeds * len(self.iterations)

    def seeds_of(self, size: str) -> list[int]:
        """Every seed a size is trained with, each once."""
        extra = [seed for more in self.replicates if size in more.sizes for seed in more.seeds]
        return list(dict.fromkeys([*self.seeds, *extra]))


MOST_RUNS = 100_000
"""Runs of one study: beyond it a grid is a slip of the pen, and expanding it takes minutes."""


def _usable_path(value: Path | str) -> Path | str:
    """What the system would otherwise refuse in words of its own, wherever it is first asked."""
    if "\0" in str(value):
        raise ValueError("holds a NUL character, which no path may")
    if len(os.fsencode(value)) > 4000 or any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
        raise ValueError("is longer than a path may be")
    return value


PlainPath = Annotated[Path, AfterValidator(_usable_path)]
"""A path that may be asked for."""
Flops = Annotated[float, Field(ge=1e6, le=1e24)]
"""Peak operations a second of a device."""


class CorpusFacts(Frozen):
    """What planning needs of a corpus that is not on this machine."""

    n_codebooks: Count
    codebook_size: Count
    frames: Count
    clips: Count
    """Clips of the training split."""


class CorpusChoice(Frozen):
    """Which corpus, and what the study expects of it."""

    path: PlainPath
    codec: str | None = None
    """Name the corpus's codec must have."""
    frames: Count | None = None
    """Frames of a training sequence; null takes whole clips."""
    facts: CorpusFacts | None = None


class TextChoice(Frozen):
    """The text encoder: bytes (trained with the model), or a frozen one by hub name or local folder."""

    encoder: Annotated[str, AfterValidator(_usable_path)] = "bytes"
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


class Training(Frozen):
    """Everything about training that a Run takes over as it is."""

    batch: Count
    optimiser: Optimiser
    schedule: Schedule = Schedule()
    regularisation: Regularisation = Regularisation()
    precision: Precision = Precision.FP32
    eval_clips: Count | None = None


class Tracking(Frozen):
    """Where and how often progress is reported; no part of identity."""

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


class ResourceChoice(Frozen):
    """Resources asked for by hand; null lets the harness choose."""

    ranks: Count = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch: Count | None = None
    threads: Count | None = None
    jobs: Count | None = None
    """Series trained at once by the local dispatcher."""
    checkpoint_every: Count = 1000
    keep_last: Count = 1
    """Newest periodic checkpoints kept besides branch points: the older ones are what a damaged one falls back on."""
    keep_best: bool = False
    """Whether the checkpoint with the lowest held-out loss is kept too; needs tracking.eval_every to have any."""
    peak_flops: Flops | None = None


class Study(Frozen):
    """The validated YAML."""

    name: str
    root: PlainPath | None = None
    corpus: CorpusChoice
    text: TextChoice = TextChoice()
    model: ModelPatch = ModelPatch()
    grid: Grid
    training: Training
    tracking: Tracking = Tracking()
    resources: ResourceChoice = ResourceChoice()

    @field_validator("name")
    @classmethod
    def _name_is_a_plain_word(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
            raise ValueError(
                "a name has letters, digits, '.', '_' and '-', begins with a letter or digit, at most 64"
            )
        return value

    @model_validator(mode="after")
    def _warmup_ends_before_the_first_branch(self) -> Study:
        schedule, shortest = self.training.schedule, self.grid.iterations[0]
        stable_end = branch_step(schedule, shortest) or shortest
        if schedule.warmup > stable_end:
            raise ValueError(
                f"training.schedule.warmup: {schedule.warmup}: longer than the {stable_end} steps before the decay "
                f"of the shortest run, grid.iterations.0 = {shortest}"
            )
        return self


class CorpusView(Frozen):
    """A corpus as the grid sees it."""

    n_codebooks: int
    codebook_size: int
    frames: int
    clips: int
    fingerprint: str

    @property
    def is_known(self) -> bool:
        """Whether the content is known, so that Runs on it have an identity."""
        return self.fingerprint != UNKNOWN_FINGERPRINT


@dataclass(frozen=True)
class GridPoint:
    """A Run with the names its study gives to where it stands in the grid."""

    architecture: str
    size: str
    run: Run

    @cached_property
    def run_id(self) -> str:
        """The Run's identity, hashed once."""
        return self.run.run_id

    @cached_property
    def series_id(self) -> str:
        """The identity of the Run's Series, hashed once."""
        return self.run.series_id


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


def view_corpus(study: Study, where: str) -> CorpusView:
    """The study's corpus from its manifest, else from the facts declared; raises InputError without either.

    Also raises InputError where the manifest and what the study expects of it disagree.
    """
    choice = study.corpus
    try:
        manifest = load_manifest(choice.path)
    except InputError as error:
        if choice.facts is None or choice.path.exists():
            raise InputError(f"{where}: corpus.path: {error}") from error
        facts = choice.facts
        return CorpusView(
            n_codebooks=facts.n_codebooks,
            codebook_size=facts.codebook_size,
            frames=choice.frames or facts.frames,
            clips=facts.clips,
            fingerprint=UNKNOWN_FINGERPRINT,
        )
    _compare(study, manifest, where)
    return CorpusView(
        n_codebooks=manifest.codec.n_codebooks,
        codebook_size=manifest.codec.codebook_size,
        frames=choice.frames or manifest.frames,
        clips=manifest.splits["train"].clips if "train" in manifest.splits else 0,
        fingerprint=manifest.fingerprint,
    )


def _compare(study: Study, manifest: Manifest, where: str) -> None:
    choice, codec = study.corpus, manifest.codec
    if choice.codec is not None and choice.codec != codec.name:
        raise InputError(
            f"{where}: corpus.codec: {choice.codec!r}: {choice.path} was made by the codec {codec.name!r}"
        )
    if choice.frames is not None and choice.frames > manifest.frames:
        raise InputError(
            f"{where}: corpus.frames: {choice.frames}: the clips of {choice.path} have {manifest.frames} frames"
        )
    if choice.facts is not None:
        held = {
            "n_codebooks": codec.n_codebooks,
            "codebook_size": codec.codebook_size,
            "frames": manifest.frames,
            "clips": manifest.splits["train"].clips if "train" in manifest.splits else 0,
        }
        for key, value in choice.facts.model_dump().items():
            if held[key] != value:
                raise InputError(f"{where}: corpus.facts.{key}: {value}: {choice.path} has {held[key]}")


def expand(study: Study, corpus: CorpusView, text_fingerprint: str | None, where: str) -> list[GridPoint]:
    """Every Run of the grid, architectures and sizes in the study's order, then seeds, then iterations.

    Raises InputError where a size makes no model, naming the size and the architecture, and where there are too many.
    """
    if (runs := study.grid.n_runs) > MOST_RUNS:
        raise InputError(f"{where}: grid: stands for {runs:,} runs; at most {MOST_RUNS:,} make one study")
    points = list(_points(study, corpus, text_fingerprint, where))
    seen: dict[str, GridPoint] = {}
    for point in points:
        first = seen.setdefault(point.run_id, point)
        if first is not point:
            raise InputError(
                f"{where}: grid.sizes.{point.size} ({point.architecture}): is the same run as {first.size}; drop one"
            )
    return points


def _points(
    study: Study, corpus: CorpusView, text_fingerprint: str | None, where: str
) -> Iterator[GridPoint]:
    training = study.training
    for architecture, own in study.grid.architectures.items():
        for size, shared in study.grid.sizes.items():
            patches = (shared, own.sizes.get(size, SizePatch()))
            model = _model(study, corpus, architecture, (own.model, *patches), f"{where}: grid.sizes.{size}")
            changes = _merged(own.optimiser, *(getattr(patch, "optimiser", None) for patch in patches))
            optimiser = validate(
                Optimiser,
                training.optimiser.model_dump() | changes,
                f"{where}: grid.sizes.{size} ({architecture}): optimiser",
            )
            for seed in study.grid.seeds_of(size):
                for iterations in study.grid.iterations:
                    run = Run(
                        recipe_version=RECIPE_VERSION,
                        model=model,
                        corpus=corpus.fingerprint,
                        text_encoder=text_fingerprint,
                        frames=corpus.frames,
                        batch=training.batch,
                        optimiser=optimiser,
                        schedule=_own_schedule(training.schedule),
                        regularisation=training.regularisation,
                        precision=training.precision,
                        eval_clips=training.eval_clips,
                        iterations=iterations,
                        seed=seed,
                    )
                    yield GridPoint(str(architecture), size, run)


def _model(
    study: Study, corpus: CorpusView, architecture: Architecture, patches: Sequence[Any], where: str
) -> ModelConfig:
    text = TextConfig(
        encoder="bytes" if study.text.encoder == "bytes" else "frozen",
        dim=study.text.dim,
        patch=study.text.patch,
        max_positions=study.text.max_positions,
    )
    unused = _unused_by(architecture)
    fields = {name: value for name, value in _merged(study.model, *patches).items() if name not in unused}
    try:
        return ModelConfig(
            architecture=architecture,
            text=text,
            n_codebooks=corpus.n_codebooks,
            codebook_size=corpus.codebook_size,
            **fields,
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}{'.' + key if key else ''} ({architecture}): {message}") from error


def _unused_by(architecture: Architecture) -> set[str]:
    """Keys of a model, given for all architectures, that decide nothing about this one and so are no part of it."""
    unused = {"optimiser"}
    if not architecture.has_mixer:
        unused |= {"d_state", "d_conv", "expand", "ssm_head_dim", "n_groups"}
    if architecture.has_prefix:
        unused.add("head_dim")
    if SubLayer.FEED_FORWARD not in architecture.sub_layers:
        unused.add("ff_mult")
    return unused


def _own_schedule(schedule: Schedule) -> Schedule:
    """A schedule without what its kind does not use."""
    if schedule.kind is ScheduleKind.WSD:
        return schedule
    unused = (
        {"decay_fraction"} if schedule.kind is ScheduleKind.COSINE else {"decay_fraction", "final_fraction"}
    )
    return Schedule(**schedule.model_dump(exclude=unused))


def _merged(*patches: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for patch in patches:
        if patch is not None:
            fields |= patch.model_dump(exclude_unset=True)
    return fields
