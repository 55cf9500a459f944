"""The fitted study as plain frozen values, which `fit --json` prints and the report shows."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import PrivateAttr

from analysis.findings.comparison import Comparison
from analysis.findings.isoflop import OptimalSizes
from analysis.findings.note import Frozen, Note
from analysis.findings.predict import OtherPoints, Prediction
from analysis.fitting.profile import Profile
from analysis.fitting.solver import Status
from analysis.laws.law import Array, Interval
from analysis.points.checks import SeedNoise, TrendCheck
from analysis.points.table import Exclusion


class HeldOutPoint(Frozen):
    """A point left out of a fit, with the loss that the fit predicts for it."""

    run_id: str
    n_params: float
    tokens: float
    iterations: float | None
    loss: float
    predicted: float
    relative_error: float


class HeldOutSplit(Frozen):
    """Error of a fit on the points at and above `threshold` of `column`, which it did not use."""

    column: str
    threshold: float
    status: Status
    determined: bool
    mean_relative_error: float
    rms_relative_error: float
    points: tuple[HeldOutPoint, ...]


class HeldOut(Frozen):
    """Held-out errors and, for comparison, the in-sample one."""

    in_sample_rms: float
    largest_size: HeldOutSplit | None
    longest_budget: HeldOutSplit | None


class ArchitectureFit(Frozen):
    """One architecture's law, the status of its fit, intervals, held-out errors and notes."""

    params: dict[str, float]
    objective: float
    n_points: int
    n_runs: int
    n_clusters: int
    status: Status
    ci95: dict[str, Interval]
    heldout: HeldOut
    profile: dict[str, Profile]
    size_effect_p: float | None
    """P-value of the effect of size on the loss."""
    predictions: tuple[Prediction, ...]
    other_points: OtherPoints | None
    checks: tuple[TrendCheck, ...]
    seed_noise: tuple[SeedNoise, ...]
    notes: tuple[Note, ...]


class Resampling(Frozen):
    """Settings of the intervals, sufficient to reproduce them."""

    scheme: Literal["cluster", "mixed", "wild"]
    interval: Literal["percentile"] = "percentile"
    resamples: int
    seed: int


class FitDocument(Frozen):
    """The whole result; `model_dump(mode="json")` is what `fit --json` prints."""

    law: str
    formula: str
    huber_delta: float
    delta_rule: Literal["noise", "fixed"] = "fixed"
    """Origin of delta: the noise, or the user."""
    architectures: dict[str, ArchitectureFit]
    comparison: Comparison
    isoflop: dict[str, OptimalSizes]
    points: Literal["annealed", "unannealed"]
    resampling: Resampling
    notes: tuple[Note, ...]
    versions: dict[str, str]
    exclusions: tuple[Exclusion, ...] = ()

    _draws: dict[str, Array] = PrivateAttr(default_factory=dict)

    def draws(self, architecture: str) -> Array:
        """Return the parameters of every resample (resamples, parameters); none if read from a file."""
        width = len(self.architectures[architecture].params)
        return self._draws.get(architecture, np.empty((0, width)))
