"""From a Study to the grid of Runs it stands for.

Everything is checked before anything is written. What the grid needs of a corpus (codebooks, clip length,
fingerprint) is read from its manifest, or taken from `corpus.facts` where the corpus is elsewhere; then runs can
be planned and costed, but have no identity yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from harness.common.validation import validate
from harness.study.run import RECIPE_VERSION, Frozen, Optimiser, Run, Schedule, ScheduleKind
from harness.study.schema import TUNED, SizeKeys, SizePatch, Study, merged
from harness.study.tune import Tuned, tuned_rate
from ssmttm.corpus.manifest import Manifest, load_manifest
from ssmttm.errors import InputError
from ssmttm.model.architecture import Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.model.layers.layer import LAYERS
from ssmttm.model.sizes import Sizing, sized_model, width_step
from ssmttm.text.config import TextConfig

UNKNOWN_FINGERPRINT = "0" * 64
"""Stands for a corpus or an encoder that is not here: such Runs are planned and never trained."""


MOST_RUNS = 100_000
"""Runs of one study: beyond it a grid is a slip of the pen, and expanding it takes minutes."""


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
        if choice.frames is not None and choice.frames > facts.frames:
            raise InputError(
                f"{where}: corpus.frames: {choice.frames}: corpus.facts.frames is {facts.frames}; a sequence is "
                "cropped from a clip"
            ) from error
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
        # What decides the model and its sequences is held to; how many clips there are is noted by the plan.
        facts, frames = choice.facts, choice.frames
        said = {
            "n_codebooks": (facts.n_codebooks, codec.n_codebooks),
            "codebook_size": (facts.codebook_size, codec.codebook_size),
            "frames": (frames or facts.frames, frames or manifest.frames),
        }
        for key, (expected, held) in said.items():
            if expected != held:
                raise InputError(
                    f"{where}: corpus.facts.{key}: {expected}: {choice.path} has {held}; build the corpus that was "
                    "planned for, or say what this one has"
                )


def expand(
    study: Study, corpus: CorpusView, text_fingerprint: str | None, where: str, tuned: Tuned | None = None
) -> list[GridPoint]:
    """Every Run of the grid, architectures and sizes in the study's order, then seeds, then iterations.

    Raises InputError where a size makes no model, naming the size and the architecture, where there are too many, and
    where a learning rate is left to `tuned`, which does not tell it.
    """
    if (runs := study.grid.n_runs) > MOST_RUNS:
        raise InputError(f"{where}: grid: stands for {runs:,} runs; at most {MOST_RUNS:,} make one study")
    points = list(_points(study, corpus, text_fingerprint, where, tuned))
    seen: dict[str, GridPoint] = {}
    for point in points:
        first = seen.setdefault(point.run_id, point)
        if first is not point:
            raise InputError(
                f"{where}: grid.sizes.{point.size} ({point.architecture}): is the same run as {first.size}; drop one"
            )
    return points


def _points(
    study: Study, corpus: CorpusView, text_fingerprint: str | None, where: str, tuned: Tuned | None
) -> Iterator[GridPoint]:
    training = study.training
    for architecture, own in study.grid.architectures.items():
        for size, shared in study.grid.sizes.items():
            patches = (shared, own.sizes.get(size, SizePatch()))
            model = _model(study, corpus, architecture, size, where)
            changes = merged(own.optimiser, *(getattr(patch, "optimiser", None) for patch in patches))
            of_size = f"{where}: grid.sizes.{size} ({architecture}): optimiser"
            fields = training.optimiser.model_dump() | changes
            if fields["lr"] == TUNED:
                fields["lr"] = tuned_rate(tuned, model, of_size)
            optimiser = validate(Optimiser, fields, of_size)
            for seed in study.grid.seeds_of(size):
                for iterations in study.grid.iterations_of(architecture):
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
    study: Study, corpus: CorpusView, architecture: Architecture, size: str, where: str
) -> ModelConfig:
    text = TextConfig(
        encoder="bytes" if study.text.encoder == "bytes" else "frozen",
        dim=study.text.dim,
        patch=study.text.patch,
        max_positions=study.text.max_positions,
    )
    own = study.grid.architectures[architecture]
    said = merged(study.model, own.model, study.grid.sizes[size], own.sizes.get(size))
    unused = _unused_by(architecture)
    fields = {name: value for name, value in said.items() if name not in unused}
    fields |= {"architecture": architecture, "text": text}
    fields |= {"n_codebooks": corpus.n_codebooks, "codebook_size": corpus.codebook_size}
    keys = study.size_keys_of(architecture, size)
    sizing = Sizing(n_params=keys.n_params, aspect=keys.aspect, tolerance=keys.tolerance)
    key = f"{where}: grid.sizes.{size}"
    try:
        return sized_model(fields, sizing, width_step(said))
    except ValidationError as error:
        first = error.errors()[0]
        inner = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{key}{'.' + inner if inner else ''} ({architecture}): {message}") from error
    except InputError as error:
        raise InputError(f"{key}.{error}") from error


def _unused_by(architecture: Architecture) -> set[str]:
    """Keys of a model, given for all architectures, that decide nothing about this one and so are no part of it."""
    of_layers = {key for layer in LAYERS.values() for key in layer.keys}
    used = {key for layer in architecture.layers for key in layer.keys}
    return {"optimiser", "resources", *SizeKeys.model_fields} | of_layers - used


def _own_schedule(schedule: Schedule) -> Schedule:
    """A schedule without what its kind does not use."""
    if schedule.kind is ScheduleKind.WSD:
        return schedule
    unused = (
        {"decay_fraction"} if schedule.kind is ScheduleKind.COSINE else {"decay_fraction", "final_fraction"}
    )
    return Schedule(**schedule.model_dump(exclude=unused))
