"""Expands a Study to its grid of Runs.

For a corpus that is not on this machine `corpus.facts` replace its manifest; its Runs can be planned, but not trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from harness.common.validation import validate
from harness.study.run import RECIPE_VERSION, Frozen, Optimiser, Precision, Run, Schedule, ScheduleKind
from harness.study.schema import TUNED, CorpusChoice, SizeKeys, Study, merged
from harness.study.tune import Tuned, tuned_rate
from ssmttm.corpus.manifest import Manifest, load_manifest
from ssmttm.errors import InputError
from ssmttm.model.architecture import Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.model.layers.layer import LAYERS
from ssmttm.model.sizes import Sizing, sized_model, width_step
from ssmttm.text.config import TextConfig

UNKNOWN_FINGERPRINT = "0" * 64
"""Fingerprint of a corpus or an encoder that is not on this machine; its Runs are planned and never trained."""
MOST_RUNS = 100_000
"""Largest number of Runs of a study: a larger grid is a mistake, and expanding it takes minutes."""


class CorpusView(Frozen):
    """The facts of a corpus that the grid needs."""

    n_codebooks: int
    codebook_size: int
    frames: int
    clips: int
    fingerprint: str

    @property
    def is_known(self) -> bool:
        """True if its content is known, so that its Runs have an identity."""
        return self.fingerprint != UNKNOWN_FINGERPRINT


@dataclass(frozen=True)
class GridPoint:
    """A Run with its architecture and its size, by their names in the study."""

    architecture: str
    size: str
    run: Run
    run_id: str
    """Identity of the Run, hashed once."""
    series_id: str
    """Identity of the Run's Series, hashed once for all Runs of a trunk."""


def view_corpus(study: Study, where: str) -> CorpusView:
    """Return the corpus by its manifest, else by `corpus.facts`; raises InputError if it does not fit the study."""
    choice = study.corpus
    try:
        manifest = load_manifest(choice.path)
    except InputError as error:
        if choice.facts is None or choice.path.exists():
            raise InputError(f"{where}: corpus.path: {error}") from error
        view = CorpusView(**choice.facts.model_dump(), fingerprint=UNKNOWN_FINGERPRINT)
    else:
        _compare(choice, manifest, where)
        view = CorpusView(
            n_codebooks=manifest.codec.n_codebooks,
            codebook_size=manifest.codec.codebook_size,
            frames=manifest.frames,
            clips=manifest.splits["train"].clips if "train" in manifest.splits else 0,
            fingerprint=manifest.fingerprint,
        )
    if choice.frames is not None and choice.frames > view.frames:
        raise InputError(
            f"{where}: corpus.frames: {choice.frames}: the clips of {choice.path} have {view.frames} frames"
        )
    return view.model_copy(update={"frames": choice.frames or view.frames})


def _compare(choice: CorpusChoice, manifest: Manifest, where: str) -> None:
    codec = manifest.codec
    if choice.codec is not None and choice.codec != codec.name:
        raise InputError(
            f"{where}: corpus.codec: {choice.codec!r}: {choice.path} was made with the codec {codec.name!r}"
        )
    # The plan notes another number of clips.
    actual = {"n_codebooks": codec.n_codebooks, "codebook_size": codec.codebook_size}
    if choice.frames is None:
        actual["frames"] = manifest.frames
    for key, value in actual.items():
        if (expected := getattr(choice.facts, key, value)) != value:
            raise InputError(
                f"{where}: corpus.facts.{key}: {expected}: {choice.path} has {value}; build the corpus that was "
                "planned for, or correct corpus.facts"
            )


def expand(
    study: Study, corpus: CorpusView, text_fingerprint: str | None, where: str, tuned: Tuned | None = None
) -> list[GridPoint]:
    """Return every Run of the grid, in the order architecture, size, seed, iterations.

    Raises InputError for too many Runs, a size that makes no model, and a learning rate that `tuned` does not have.
    """
    if (n_runs := study.grid.n_runs) > MOST_RUNS:
        raise InputError(f"{where}: grid: has {n_runs:,} runs; a study may have {MOST_RUNS:,} at most")
    found: dict[str, GridPoint] = {}
    for architecture, own in study.grid.architectures.items():
        for size in study.grid.sizes:
            key = f"{where}: grid.sizes.{size} ({architecture})"
            model = _model(study, corpus, architecture, size, where)
            if model.residual == "bf16" and study.training.precision is not Precision.BF16:
                raise InputError(f"{key}: residual: bf16: goes with training.precision: bf16 alone")
            patches = study.patches_of(architecture, size)
            changes = merged(own.optimiser, *(patch.optimiser for patch in patches))
            optimiser = study.training.optimiser.model_dump() | changes
            if optimiser["lr"] == TUNED:
                optimiser["lr"] = tuned_rate(tuned, model, f"{key}: optimiser")
            fields: dict[str, Any] = {
                **dict(study.training),
                "recipe_version": RECIPE_VERSION,
                "model": model,
                "corpus": corpus.fingerprint,
                "text_encoder": text_fingerprint,
                "frames": corpus.frames,
                "optimiser": validate(Optimiser, optimiser, f"{key}: optimiser"),
                "schedule": _own_schedule(study.training.schedule),
            }
            for seed in study.grid.seeds_of(size):
                runs = [
                    Run(**fields, iterations=n, seed=seed) for n in study.grid.iterations_of(architecture)
                ]
                trunk = runs[0].series_id if runs[0].schedule.shares_trunk else None
                for run in runs:
                    point = GridPoint(str(architecture), size, run, run.run_id, trunk or run.series_id)
                    if (first := found.setdefault(point.run_id, point)) is not point:
                        raise InputError(f"{key}: is the same run as {first.size}; drop one")
    return list(found.values())


def _model(
    study: Study, corpus: CorpusView, architecture: Architecture, size: str, where: str
) -> ModelConfig:
    text = TextConfig(
        encoder="bytes" if study.text.encoder == "bytes" else "frozen",
        dim=study.text.dim,
        patch=study.text.patch,
        max_positions=study.text.max_positions,
    )
    own = study.grid.architectures[architecture].model
    keys = merged(study.model, own, *study.patches_of(architecture, size))
    unused = _unused_by(architecture)
    fields = {name: value for name, value in keys.items() if name not in unused}
    fields |= {"architecture": architecture, "text": text}
    fields |= {"n_codebooks": corpus.n_codebooks, "codebook_size": corpus.codebook_size}
    sizing = Sizing(**study.size_keys_of(architecture, size).model_dump(exclude={"reference_n_params"}))
    key = f"{where}: grid.sizes.{size}"
    try:
        return sized_model(fields, sizing, width_step(keys))
    except ValidationError as error:
        first = error.errors()[0]
        inner = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{key}{'.' + inner if inner else ''} ({architecture}): {message}") from error
    except InputError as error:
        raise InputError(f"{key}.{error}") from error


def _unused_by(architecture: Architecture) -> set[str]:
    """Return the keys of a size and of a model that an architecture does not use."""
    of_layers = {key for layer in LAYERS.values() for key in layer.keys}
    used = {key for layer in architecture.layers for key in layer.keys}
    return {"optimiser", "resources", *SizeKeys.model_fields} | of_layers - used


def _own_schedule(schedule: Schedule) -> Schedule:
    """Return the schedule without the keys that its kind does not use."""
    unused = {
        ScheduleKind.COSINE: {"decay_fraction"},
        ScheduleKind.CONSTANT: {"decay_fraction", "final_fraction"},
    }
    return Schedule(**schedule.model_dump(exclude=unused.get(schedule.kind)))
