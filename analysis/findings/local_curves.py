"""The size ratio from the losses themselves, beside that of the law: no parametric form stands between them.

The loss of each architecture is smoothed over size and data (analysis.fitting.surface). At a trained budget its curve
against size is made to fall by rearrangement (Chernozhukov, Fernandez-Val and Galichon 2009, doi 10.1093/biomet/asp030)
and solved for the reference's smoothed loss. Beyond the sizes that were trained at that budget there is no number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from analysis import text as wording
from analysis.findings.curve import Curve
from analysis.findings.equal_loss import AtEqualLoss, Compared, SizeRatio
from analysis.findings.support import SAME
from analysis.fitting.bootstrap import cluster_keys
from analysis.fitting.surface import Rows, Surface, surfaces
from analysis.laws.law import Array

READ_AT = 65  # sizes between the smallest and the largest trained one at which a curve is read
RISING = 0.005  # share of the draws in which a curve that falls with size may rise
OpenInterval = tuple[float | None, float | None]


class ModelFree(AtEqualLoss):
    """N_ref / N' at equal loss and budget by smoothed losses; `loss` is the reference's smoothed loss.

    An end of `ci95` is null if it lies beyond the trained sizes. `disagrees` is true if the law's ratio differs by more
    than the 95 % intervals of both.
    """

    n_params: float | None
    ratio: float | None
    ci95: OpenInterval | None
    status: Literal["identified", "not_identified"]
    reason: str
    disagrees: bool


def model_free(
    curves: Mapping[str, Curve], reference: str, rows: Sequence[Compared], seed: int
) -> list[ModelFree]:
    """Return the model-free size ratio beside each of the law's, in their order, by as many draws as the law has."""
    base = curves[reference]
    pairs = {name: _Pair.of(curve, base, seed) for name, curve in curves.items() if name != reference}
    return [_beside(row, pairs[row.ratio.architecture]) for row in rows]


@dataclass(frozen=True)
class _Falling:
    """Falling curves of log loss (1 + draws, sizes) against the logarithms of sizes, at one budget."""

    logs: Array
    loss: Array
    rising: float  # share of the draws whose largest size is no better than the smallest

    def size_at(self, loss: Array) -> Array:
        """Return the log size at which each curve has its log loss (1 + draws): -inf and inf beyond the ends."""
        above = (self.loss > loss[:, None]).sum(axis=1)
        place, row = np.clip(above - 1, 0, len(self.logs) - 2), np.arange(len(loss))
        first, second = self.loss[row, place], self.loss[row, place + 1]
        share = (first - loss) / np.maximum(first - second, 1e-300)
        out: Array = self.logs[place] + share * (self.logs[1] - self.logs[0])
        out[above == 0], out[above == len(self.logs)] = -np.inf, np.inf
        return out


@dataclass(frozen=True)
class _Pair:
    """An architecture and the reference with their smoothed losses, or the reason why the points give none."""

    curve: Curve
    base: Curve
    found: tuple[Surface, Surface] | str
    at: dict[float, _Falling] = field(default_factory=dict)

    @classmethod
    def of(cls, curve: Curve, base: Curve, seed: int) -> _Pair:
        """Smooth the losses of both together, so that they share what the noise is estimated from."""
        found = surfaces([_rows(curve), _rows(base)], len(curve.params) - 1, seed)
        return cls(curve, base, found if isinstance(found, str) else (found[0], found[1]))

    def falling(self, surface: Surface, data: float) -> _Falling:
        """Return the architecture's curve at an amount of data, between the sizes trained there."""
        if data not in self.at:
            smallest, largest = np.log(self.curve.support.sizes_at(data))
            logs = np.linspace(float(smallest), float(largest), READ_AT)
            loss = surface.log_loss(_logs(np.exp(logs), data, self.curve))
            rising = float(np.mean(loss[1:, 0] <= loss[1:, -1])) if len(loss) > 1 else 0.0
            bent = (np.diff(loss, axis=1) > 0).any(axis=1)
            loss[bent] = -np.sort(-loss[bent], axis=1)
            self.at[data] = _Falling(logs, loss, rising)
        return self.at[data]


def _rows(curve: Curve) -> Rows:
    frame, law = curve.frame, curve.law
    columns = {name: frame[name].to_numpy(dtype=np.float64) for name in ("n_params", "seed", "loss")}
    data = frame[law.data.column].to_numpy(dtype=np.float64) if law.data else np.ones(len(frame))
    names = [str(name) for name in frame["cluster"]]
    cluster, _ = cluster_keys(columns["n_params"], columns["seed"], names)
    return Rows(_logs(columns["n_params"], data, curve), np.log(columns["loss"]), cluster)


def _logs(n_params: Array, data: Array | float, curve: Curve) -> Array:
    """Return ln N and ln D (points, 2), where a law without a data input has ln D of 0."""
    amount = data if curve.law.data else 1.0
    return np.stack([np.log(n_params), np.broadcast_to(np.log(amount), len(n_params))], axis=1)


def _beside(law: Compared, pair: _Pair) -> ModelFree:
    row = law.ratio
    name = wording.architecture(row.architecture)
    if isinstance(pair.found, str):
        return _refused(row, row.loss, pair.found)
    own, other = pair.found
    support, data = pair.curve.support, pair.curve.data(row.iterations, row.tokens)
    there = pair.base.data(row.iterations, row.tokens)
    wanted = other.log_loss(_logs(np.array([row.reference_n_params]), there, pair.base))[:, 0]
    loss = float(np.exp(wanted[0]))
    middle = float(np.sqrt(np.prod(support.sizes_at(data))))
    if not (at := support.place(middle, data)).in_hull:
        return _refused(row, loss, at.reason("the equal size", name))
    curve = pair.falling(own, data)
    if curve.logs[-1] - curve.logs[0] < np.log(SAME):
        return _refused(row, loss, f"{name} was trained at one size only at this budget")
    size = curve.size_at(wanted)
    if size[0] == np.inf:
        return _refused(row, loss, f"no size of {name} trained at this budget reaches a loss of {loss:.4f}")
    if size[0] == -np.inf:
        return _refused(
            row, loss, f"every size of {name} trained at this budget is below a loss of {loss:.4f}"
        )
    if curve.rising > RISING:
        return _refused(row, loss, f"the losses of {name} do not measurably fall with size at this budget")
    n_params = float(np.exp(size[0]))
    if not (at := support.place(n_params, data)).inside:
        return _refused(row, loss, at.reason("the equal size", name))
    log_ratio = np.log(row.reference_n_params) - size
    ends = _ends(log_ratio)
    if ends == (None, None):
        return _refused(row, loss, f"the losses at this budget exclude none of the trained sizes of {name}")
    return ModelFree(
        **_shared(row, loss),
        n_params=n_params,
        ratio=float(np.exp(log_ratio[0])),
        ci95=ends,
        status="identified",
        reason="",
        disagrees=_disagrees(law, log_ratio),
    )


def _refused(row: SizeRatio, loss: float, reason: str) -> ModelFree:
    empty = {"n_params": None, "ratio": None, "ci95": None, "disagrees": False}
    return ModelFree(**_shared(row, loss), **empty, status="not_identified", reason=reason)


def _shared(row: SizeRatio, loss: float) -> dict[str, Any]:
    return row.model_dump(include=set(AtEqualLoss.model_fields)) | {"loss": loss}


def _ends(log_ratio: Array) -> OpenInterval | None:
    """Return the central 95 % of the draws of a log ratio (1 + draws) as ratios; None for an end that is infinite."""
    if len(log_ratio) < 3:
        return None
    low, high = np.percentile(log_ratio[1:], [2.5, 97.5], method="nearest")
    return float(np.exp(low)) if np.isfinite(low) else None, float(np.exp(high)) if np.isfinite(
        high
    ) else None


def _disagrees(law: Compared, log_ratio: Array) -> bool:
    """Return True if 95 % of the law's resamples less the draws (1 + draws), taken as independent, have one sign."""
    if law.ratio.estimate is None or len(log_ratio) < 3:
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.nan_to_num(np.log(law.values[1:]) - log_ratio[1:], nan=0.0)
    low, high = np.percentile(apart, [2.5, 97.5])
    return bool(low > 0 or high < 0)
