"""The fitted study as plain frozen values: what `fit --json` prints and what a report is made of."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import PrivateAttr

from analysis.findings import curve as compare
from analysis.findings.equal_loss import TokenGain
from analysis.findings.isoflop import OptimalSizes
from analysis.findings.note import Frozen, Note
from analysis.findings.predict import OtherPoints, Prediction
from analysis.fitting.solver import Status
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array
from analysis.points.checks import SeedNoise, TrendCheck

Interval = tuple[float, float]


class HeldOutPoint(Frozen):
    """A point left out of a fit, with the loss that fit predicts for it."""

    run_id: str
    n_params: float
    tokens: float
    iterations: float | None
    loss: float
    predicted: float
    relative_error: float


class HeldOutSplit(Frozen):
    """Error of a fit on the points at and above `threshold` of `column`, none of which it saw."""

    column: str
    threshold: float
    status: Status
    determined: bool
    mean_relative_error: float
    rms_relative_error: float
    points: tuple[HeldOutPoint, ...]


class HeldOut(Frozen):
    """Held-out errors, beside the in-sample one that they should be read against."""

    in_sample_rms: float
    largest_size: HeldOutSplit | None
    longest_budget: HeldOutSplit | None


class ProfileCurve(Frozen):
    """Objective minimised over all else at each value.

    `allowed` is where its nominal 95 % ends; an open end of `interval` is null, and makes the profile flat.
    """

    values: tuple[float, ...]
    objective: tuple[float, ...]
    allowed: float
    interval: tuple[float | None, float | None]


class Convention(Frozen):
    """A headline figure under another convention of counting, and whether that changes what it says."""

    architecture: str
    quantity: Literal["size_ratio", "compute_gain"]
    convention: str
    value: float
    under: str
    value_under: float
    changes: bool


class ArchitectureFit(Frozen):
    """One architecture's law, how its fit ended, intervals, held-out error and notes.

    `size_effect_p` is how often a loss that does not depend on size would look as if it did as much.
    """

    params: dict[str, float]
    objective: float
    n_points: int
    n_runs: int
    n_clusters: int
    status: Status
    ci95: dict[str, Interval]
    heldout: HeldOut
    profile: dict[str, ProfileCurve]
    size_effect_p: float | None
    predictions: tuple[Prediction, ...]
    other_points: OtherPoints | None
    checks: tuple[TrendCheck, ...]
    seed_noise: tuple[SeedNoise, ...]
    notes: tuple[Note, ...]


class SizeRatio(Frozen):
    """N_ref / N' at equal loss and budget.

    `ratio` and `ci95` are null unless the ratio is identified. `estimate` is what the laws give even where the
    equal size or the budget lies outside the trained ones.
    """

    architecture: str
    iterations: float | None
    tokens: float
    reference_n_params: float
    loss: float
    n_params: float | None
    ratio: float | None
    ci95: Interval | None
    estimate: float | None
    estimate_ci95: Interval | None
    status: compare.Verdict
    reason: str


class ComputeGain(Frozen):
    """Training FLOPs of the reference over those of the architecture at equal loss and budget."""

    architecture: str
    iterations: float | None
    tokens: float
    reference_n_params: float
    loss: float
    reference_flops: float | None
    flops: float | None
    gain: float | None
    ci95: Interval | None
    status: compare.Verdict


class Comparison(Frozen):
    """Every architecture against the reference."""

    reference: str
    n_convention: str
    paired: bool
    size_ratio: tuple[SizeRatio, ...]
    compute_gain: tuple[ComputeGain, ...]
    token_gain: tuple[TokenGain, ...]
    conventions: tuple[Convention, ...]


class Resampling(Frozen):
    """How the intervals were made: enough to make them again."""

    scheme: Literal["cluster", "wild"]
    interval: Literal["percentile"] = "percentile"
    resamples: int
    seed: int


class FitDocument(Frozen):
    """The whole result; `model_dump(mode="json")` is what `fit --json` prints."""

    law: str
    formula: str
    huber_delta: float
    architectures: dict[str, ArchitectureFit]
    comparison: Comparison
    isoflop: dict[str, OptimalSizes]
    points: Literal["annealed", "unannealed"]
    resampling: Resampling
    notes: tuple[Note, ...]
    versions: dict[str, str]

    _draws: dict[str, Array] = PrivateAttr(default_factory=dict)

    @property
    def formula_data_symbol(self) -> str:
        """T where the law counts iterations, D where it counts tokens."""
        return "T" if law_named(self.law).inputs[-1] == "iterations" else "D"

    def draws(self, architecture: str) -> Array:
        """Parameters at every resample (resamples, parameters); empty when the document was read from a file."""
        width = len(self.architectures[architecture].params)
        return self._draws.get(architecture, np.empty((0, width)))
