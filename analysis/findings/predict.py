"""Losses that a fitted law predicts for requested sizes and budgets, with intervals and the distance from the points.

Also the comparison of points taken mid-run with a law of annealed points, or the reverse; no fit mixes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.errors import InputError
from analysis.findings.curve import Curve
from analysis.findings.note import Frozen
from analysis.fitting.bootstrap import interval
from analysis.fitting.held_out import Drift
from analysis.laws.law import Array, Interval
from analysis.points.checks import data_column, size_times_data
from analysis.points.table import CheckedPoints

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
NUMBER = r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([kKmMbBgGtT]?)"
ASKED = re.compile(rf"\s*{NUMBER}\s*:\s*{NUMBER}\s*(tokens|iterations)?\s*")
EXTENSION = (2.0, 4.0)  # multiples of the largest trained size that are predicted by default
EXTRAPOLATION_LIMIT = 4.0  # factor beyond the trained range from which on a note warns


@dataclass(frozen=True)
class Ask:
    """One configuration to predict: a size and an amount of training.

    `unit` None means iterations if the points have them, else tokens.
    """

    n_params: float
    amount: float
    unit: Literal["iterations", "tokens"] | None = None


@dataclass(frozen=True)
class Prediction:
    """The law's loss for an Ask, in nats.

    `ci95` is the interval of the law, `run95` that of one further run with its own noise; None if the law has as many
    parameters as points, which show no noise. Of a law that the residuals reject, `run95` includes its error on the
    largest compute too, in proportion to the distance ln(size x data) beyond the points. The factors say how far size
    and budget lie beyond the trained range: 1 inside it, 2 at twice the largest or half the smallest. `compute_factor`
    is 6 N D over the largest of the runs, 1 below it. `in_support` is true if the runs support a value at this size and
    budget together.
    """

    n_params: float
    iterations: float | None
    tokens: float | None
    loss: float
    ci95: Interval | None
    run95: Interval | None
    size_factor: float
    budget_factor: float
    compute_factor: float
    in_support: bool


class OtherPoints(Frozen):
    """Points of the kind that the fit does not use, compared with its law within the fitted range.

    `mean_relative_difference` is positive if their losses lie above the law.
    """

    kind: Literal["annealed", "unannealed"]
    points: int
    mean_relative_difference: float


def asked(text: str) -> Ask:
    """Parse `300M:4000` (iterations if the points have them, else tokens) or `1e9:20Btokens`; raises InputError."""
    found = ASKED.fullmatch(text)
    if found is None:
        raise InputError(
            f"--predict {text}: expected SIZE:BUDGET, such as 300M:4000 (iterations if the points have them, else "
            "tokens), 300M:4000iterations or 300M:2Btokens."
        )
    size, size_unit, amount, amount_unit, unit = found.groups()
    ask = Ask(
        n_params=float(size) * UNITS[size_unit.lower()],
        amount=float(amount) * UNITS[amount_unit.lower()],
        unit="tokens" if unit == "tokens" else "iterations" if unit else None,
    )
    if not (0 < ask.n_params < 1e24 and 0 < ask.amount < 1e24):
        raise InputError(f"--predict {text}: size and budget must be above 0 and below 1e24.")
    return ask


def extension(curve: Curve) -> list[Ask]:
    """Return asks for twice and four times the largest trained size at the longest trained budget."""
    frame = curve.frame
    unit = data_column(frame)
    return [Ask(factor * float(curve.sizes[-1]), float(frame[unit].max()), unit) for factor in EXTENSION]


def predict(
    curve: Curve, asks: Sequence[Ask], residual: Array, seed: int, drift: Drift | None = None
) -> list[Prediction]:
    """Predict with intervals from the law's resamples; `residual` are the fit's log errors (points).

    `drift` is the error of a rejected law beyond its points.

    Raises InputError if a budget is in iterations and some point has none.
    """
    frame = curve.frame
    usual = data_column(frame)
    rate = curve.tokens_an_iteration if usual == "iterations" else None
    freedom = len(residual) - len(curve.law.names)
    noise = np.sqrt(len(residual) / max(1, freedom)) * residual
    furthest = float(np.log(size_times_data(frame)).max()) if drift else 0.0
    out = []
    for number, ask in enumerate(asks):
        unit = ask.unit or usual
        if unit == "iterations" and rate is None:
            raise InputError(
                f"--predict {ask.n_params:g}:{ask.amount:g}iterations: some points have no iterations; "
                "give the budget in tokens."
            )
        tokens = ask.amount if unit == "tokens" or rate is None else ask.amount * rate
        iterations = None if rate is None else tokens / rate
        if unit == "iterations":
            tokens = curve.tokens(ask.amount)
        data = iterations if curve.law.counts_iterations else tokens
        if data is None:
            raise InputError(f"--predict: law {curve.law.name} counts iterations, and some points have none.")
        loss = curve.loss(ask.n_params, data)
        drawn = loss[1:]
        place = curve.support.place(ask.n_params, data)
        rng = np.random.default_rng([seed, 5, number])
        spread = rng.choice(noise, len(drawn)) if len(drawn) else drawn
        if drift is not None:
            distance = float(np.log(ask.n_params) + np.log(tokens)) - furthest
            spread = spread + drift.at(distance) * rng.standard_normal(len(drawn))
        out.append(
            Prediction(
                n_params=ask.n_params,
                iterations=iterations,
                tokens=tokens,
                loss=float(loss[0]),
                ci95=interval(drawn) if len(drawn) > 1 else None,
                run95=interval(drawn * np.exp(spread)) if freedom > 0 and len(drawn) > 1 else None,
                size_factor=_beyond(ask.n_params, curve.sizes),
                budget_factor=_beyond(tokens, frame["tokens"].to_numpy(dtype=np.float64)),
                compute_factor=max(1.0, place.compute),
                in_support=place.inside,
            )
        )
    return out


def _beyond(value: float, seen: Array) -> float:
    return max(1.0, value / float(seen.max()), float(seen.min()) / value)


def other_points(curve: Curve, points: CheckedPoints) -> OtherPoints | None:
    """Compare the other kind's points in the fitted range with this architecture's law; None if there are none."""
    architecture = str(curve.frame["architecture"].iloc[0])
    rows = points.others[points.others["architecture"] == architecture]
    for column in curve.law.columns:
        seen = curve.frame[column]
        rows = rows[(rows[column] >= seen.min()) & (rows[column] <= seen.max())]
    if rows.empty:
        return None
    fitted = curve.loss_of(rows)
    return OtherPoints(
        kind="unannealed" if points.annealed else "annealed",
        points=len(rows),
        mean_relative_difference=float(np.mean(rows["loss"].to_numpy(dtype=np.float64) / fitted - 1.0)),
    )
