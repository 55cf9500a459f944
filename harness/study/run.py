"""A Run: everything that can change one training result, and nothing else.

The run id is a hash of the Run's canonical JSON, without the fields at their default, so a field added later changes no
id. Runs that differ only in their iterations have the same learning rate up to their branch steps under a
warmup-stable-decay schedule; they share this trunk (Hägele et al. 2024, arXiv 2405.18392) and form a Series.
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
"""Increased with every change to the numerics of training, so that run ids differ."""

Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
WholeNumber = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]


class Frozen(BaseModel):
    """Base of immutable models that refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimiser(Frozen):
    """AdamW and gradient clipping, with the paper's defaults."""

    lr: Positive
    """Peak learning rate."""
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: Positive = 1e-7
    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.02
    """Applied only to matrices: never to biases, norms or the scan's parameters."""
    grad_clip: Positive | None = 1.0
    """Largest global gradient norm; null does not clip."""


class ScheduleKind(StrEnum):
    """Kind of schedule after the warmup."""

    WSD = "wsd"
    COSINE = "cosine"
    CONSTANT = "constant"


class Schedule(Frozen):
    """A learning-rate schedule."""

    kind: ScheduleKind = ScheduleKind.WSD
    warmup: WholeNumber = 500
    """Steps of linear warmup; not a fraction, since Runs of different length share them."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of a Run's iterations in its decay (wsd)."""
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.005
    """Learning rate at the last step over the peak (wsd and cosine)."""

    @property
    def shares_trunk(self) -> bool:
        """True if Runs of different length branch from one trunk and so form one Series."""
        return self.kind is ScheduleKind.WSD


class Regularisation(Frozen):
    """Changes to targets and captions during training."""

    label_smoothing: Probability = 0.1
    caption_dropout: Probability = 0.1
    """Share of captions replaced by the learned null condition."""
    position_dropout: Probability = 0.1
    """Share of the other captions' positions that are masked."""


class Precision(StrEnum):
    """Precision of the forward and backward pass; parameters and optimiser states stay fp32."""

    FP32 = "fp32"
    TF32 = "tf32"
    """Products of float32 matrices with 10 bits of mantissa, on GPUs alone."""
    BF16 = "bf16"


class Training(Frozen):
    """Settings of training that all Runs of a study share."""

    batch: Count
    """Sequences in a global batch."""
    optimiser: Optimiser
    schedule: Schedule = Schedule()
    regularisation: Regularisation = Regularisation()
    precision: Precision = Precision.FP32
    eval_clips: Count | None = None
    """Number of held-out clips, from the first, that the loss is measured on; null takes all."""


class Run(Training):
    """One point of the grid."""

    recipe_version: Count = 1
    """Recipe it is trained by; the default never follows RECIPE_VERSION, since ids leave it out."""
    model: ModelConfig
    corpus: Digest
    """Fingerprint of the corpus and its codec."""
    text_encoder: Digest | None = None
    """Fingerprint of the frozen text encoder; null if the encoder is trained with the model."""
    frames: Count
    iterations: Count
    """Optimiser steps of trunk and decay."""
    seed: WholeNumber = 0

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON."""
        return digest_of(self.canonical())

    @property
    def series_id(self) -> str:
        """Identity of the trunk that this Run branches from, or of the Run itself if it shares none."""
        return digest_of({"series": self.series_canonical()})

    @property
    def tokens_a_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch * self.frames * self.model.n_codebooks

    def canonical(self) -> dict[str, object]:
        """Return the fields that are not at their default, which run.json holds."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def series_canonical(self) -> dict[str, object]:
        """Return the fields that all Runs of the Series share, which series.json holds."""
        fields = self.canonical()
        if self.schedule.shares_trunk:
            del fields["iterations"]
        return fields


def digest_of(fields: dict[str, object]) -> str:
    """Return the first 12 hex digits of the SHA-256 of the fields' canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _OfSeries(Protocol):
    @property
    def series_id(self) -> str: ...


Member = TypeVar("Member", bound=_OfSeries)


def by_series(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Group members by their series id, both in the order given."""
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(member.series_id, []).append(member)
    return found


def branch_step(schedule: Schedule, iterations: int) -> int:
    """Return the number of trunk steps of a Run, before its decay; 0 if the schedule has no trunk."""
    if not schedule.shares_trunk:
        return 0
    return iterations - max(1, round(schedule.decay_fraction * iterations))


def steps_before_decay(schedule: Schedule, iterations: int) -> int:
    """Return the number of steps that the warmup must fit into: the trunk's, or all of a Run without a trunk."""
    return branch_step(schedule, iterations) or iterations


def fewest_iterations(schedule: Schedule) -> int:
    """Return the length of the shortest Run whose warmup ends before its decay."""
    found = max(1, schedule.warmup)
    while (lacking := schedule.warmup - steps_before_decay(schedule, found)) > 0:
        found += lacking  # no Run in between is long enough
    return found


def is_annealed(schedule: Schedule) -> bool:
    """True if a finished Run ends at a low learning rate, as a scaling law requires."""
    return schedule.kind is not ScheduleKind.CONSTANT


def learning_rate(schedule: Schedule, peak: float, step: int, iterations: int) -> float:
    """Return the learning rate of the update at `step`, 0 <= step < iterations."""
    if step < schedule.warmup:
        return trunk_learning_rate(schedule, peak, step)
    floor = schedule.final_fraction
    if schedule.kind is ScheduleKind.COSINE:
        progress = (step + 1 - schedule.warmup) / max(1, iterations - schedule.warmup)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    branch = branch_step(schedule, iterations)
    if schedule.shares_trunk and step >= branch:
        progress = (step + 1 - branch) / (iterations - branch)
        return peak * (1 - (1 - floor) * progress)
    return peak


def trunk_learning_rate(schedule: Schedule, peak: float, step: int) -> float:
    """Return the learning rate of a trunk step, which all Runs that branch later share."""
    return peak * (step + 1) / schedule.warmup if step < schedule.warmup else peak
