"""A Run: everything that can change one training result, and nothing else.

Identity is derived, never chosen: the run id is a hash of the Run's canonical JSON, in which a field at its
default is left out, so that a field added later orphans no finished run. Resources, paths, dispatchers and
tracking are no part of it; corpus and text encoder enter by fingerprint. Runs that differ in nothing but their
iterations share a trunk under a warmup-stable-decay schedule and form a Series.

The learning rate is a pure function of (step, iterations): no state to save, none to get wrong on resuming. Under
warmup-stable-decay every Run of a Series has the same learning rate up to its branch step, whatever its length; this is
what lets Runs share a trunk (Hägele et al. 2024, arXiv 2405.18392). Steps count from 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ssmttm.model.config import ModelConfig

RECIPE_VERSION = 1
"""Moves when the numerics of training move, so that results of two recipes are never taken for one."""

Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
WholeNumber = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]


class Frozen(BaseModel):
    """Base of everything that travels between rooms: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimiser(Frozen):
    """AdamW and its clipping; the defaults are the paper's, the learning rate has none."""

    lr: Positive
    """Peak learning rate."""
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: Positive = 1e-7
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.02
    """Applied to matrices alone: never to biases, norms or the scan's own parameters."""
    grad_clip: Positive | None = 1.0
    """Largest global gradient norm; null leaves gradients alone."""


class ScheduleKind(StrEnum):
    """Form of the learning rate after warmup."""

    WSD = "wsd"
    COSINE = "cosine"
    CONSTANT = "constant"


class Schedule(Frozen):
    """A learning-rate schedule; `learning_rate` turns it into numbers."""

    kind: ScheduleKind = ScheduleKind.WSD
    warmup: WholeNumber = 500
    """Steps of linear warmup: steps and not a fraction, so that runs of different length share them."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Under wsd: the share of a Run's iterations spent in its decay."""
    final_fraction: Fraction = 0.005
    """Learning rate at the last step over the peak (wsd and cosine)."""


class Regularisation(Frozen):
    """Changes to targets and captions while training; none while evaluating."""

    label_smoothing: Probability = 0.1
    caption_dropout: Probability = 0.1
    """Share of captions replaced whole by the learned null condition."""
    position_dropout: Probability = 0.1
    """Share of the remaining captions' positions that are masked."""


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass; parameters and optimiser states stay fp32."""

    FP32 = "fp32"
    BF16 = "bf16"


class Training(Frozen):
    """Everything about training that a study gives once and its Runs take over."""

    batch: Count
    """Sequences in a global batch, whatever the resources."""
    optimiser: Optimiser
    schedule: Schedule = Schedule()
    regularisation: Regularisation = Regularisation()
    precision: Precision = Precision.FP32
    eval_clips: Count | None = None
    """Held-out clips the loss is measured on, the first so many; null takes the whole split."""


class Run(Training):
    """One point of the grid."""

    recipe_version: Count = 1
    """The recipe it is trained by; its default is the first one for ever, whatever RECIPE_VERSION says now."""
    model: ModelConfig
    corpus: Digest
    """Fingerprint of the corpus, its codec included."""
    text_encoder: Digest | None = None
    """Fingerprint of the frozen text encoder; null where the encoder is trained with the model."""
    frames: Count
    """Frames of a training sequence (and of a held-out one)."""
    iterations: Count
    """Optimiser steps in all: trunk plus decay."""
    seed: WholeNumber = 0

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON."""
        return digest_of(self.canonical())

    @property
    def series_id(self) -> str:
        """Identity of the trunk this Run branches from; of the Run itself where none is shared."""
        return digest_of({"series": self.series_canonical()})

    @property
    def tokens_a_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch * self.frames * self.model.n_codebooks

    def canonical(self) -> dict[str, object]:
        """Fields of the Run that are not at their default: hashed, and the content of run.json."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def series_canonical(self) -> dict[str, object]:
        """Fields that the Runs of a Series have in common: the content of series.json."""
        fields = self.canonical()
        if self.schedule.kind is ScheduleKind.WSD:
            del fields["iterations"]
        return fields


def digest_of(fields: dict[str, object]) -> str:
    """First 12 hex digits of the SHA-256 of the fields' canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _OfSeries(Protocol):
    @property
    def series_id(self) -> str: ...


Member = TypeVar("Member", bound=_OfSeries)


def by_series(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Group what belongs to Series by series id, both in the order given."""
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(member.series_id, []).append(member)
    return found


def decay_steps(schedule: Schedule, iterations: int) -> int:
    """Steps of a Run that are its own and not the trunk's: all of them where no trunk is shared."""
    if schedule.kind is ScheduleKind.WSD:
        return max(1, round(schedule.decay_fraction * iterations))
    return iterations


def branch_step(schedule: Schedule, iterations: int) -> int:
    """Trunk steps done when a Run of that many iterations leaves the trunk."""
    return iterations - decay_steps(schedule, iterations)


def steps_before_decay(schedule: Schedule, iterations: int) -> int:
    """Steps in which the warmup has to end: those of the trunk, all where a Run has no trunk to leave."""
    return branch_step(schedule, iterations) or iterations


def fewest_iterations(schedule: Schedule) -> int:
    """Length of the shortest Run whose warmup ends before its decay begins."""
    found = max(1, schedule.warmup)
    while (lacking := schedule.warmup - steps_before_decay(schedule, found)) > 0:
        found += lacking  # a longer Run has at most as many more of them
    return found


def is_annealed(schedule: Schedule) -> bool:
    """True if a finished Run ends at a low learning rate, so that its loss is fit for a scaling law."""
    return schedule.kind is not ScheduleKind.CONSTANT


def learning_rate(schedule: Schedule, peak: float, step: int, iterations: int) -> float:
    """Learning rate of the update made at `step`, 0 <= step < iterations."""
    if step < schedule.warmup:
        return trunk_learning_rate(schedule, peak, step)
    floor = schedule.final_fraction
    if schedule.kind is ScheduleKind.COSINE:
        progress = (step + 1 - schedule.warmup) / max(1, iterations - schedule.warmup)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    branch = branch_step(schedule, iterations)
    if schedule.kind is ScheduleKind.WSD and step >= branch:
        progress = (step + 1 - branch) / (iterations - branch)
        return peak * (1 - (1 - floor) * progress)
    return peak


def trunk_learning_rate(schedule: Schedule, peak: float, step: int) -> float:
    """Learning rate of a trunk step: that of any Run which branches later."""
    return peak * (step + 1) / schedule.warmup if step < schedule.warmup else peak
