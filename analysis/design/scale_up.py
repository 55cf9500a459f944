"""The next step up: what to train for so many GPU-hours, the loss it should reach, and afterwards the loss it reached.

For each architecture the size that its law makes best for its share of the budget: a larger model has fewer iterations.
What was predicted is compared with what was seen by the law as it was then, fitted to the runs there were then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import ValidationError

from analysis import text as wording
from analysis.design.prior import design_law
from analysis.errors import InputError
from analysis.findings.comparison import fit_all
from analysis.findings.curve import Curve
from analysis.findings.document import refuse
from analysis.findings.note import Frozen, Note
from analysis.findings.notes import effect_notes, fit_notes
from analysis.findings.predict import EXTRAPOLATION_LIMIT, Ask, Prediction, predict
from analysis.fitting.bootstrap import interval, resample
from analysis.fitting.checks import size_effect
from analysis.laws.law import Array, Interval
from analysis.points.table import CheckedPoints

SIZES_TRIED = 600
BEYOND = 300.0
"""Sizes up to so many times the largest that was trained are tried, and down to as many below the smallest."""
ROUNDING = 1.02
"""A size is rounded to three digits, and may thereby cost somewhat more than was tried."""
VAGUE = 10.0
RESAMPLES = 1000


class Step(Frozen):
    """One architecture's next run: the size best for the budget with its interval, and the loss foreseen for it.

    `ci95` is where the law may lie, `run95` where one run may end. The factors say how far beyond the trained range
    it is.
    """

    architecture: str
    n_params: float
    n_params_ci95: Interval
    iterations: int
    tokens: float
    gpu_hours: float
    loss: float
    ci95: Interval | None
    run95: Interval | None
    size_factor: float
    budget_factor: float


class ScaleUp(Frozen):
    """What is proposed for a budget, shared evenly among the architectures, from these finished runs."""

    law: str
    huber_delta: float
    budget_gpu_hours: float
    runs: tuple[str, ...]
    steps: tuple[Step, ...]
    notes: tuple[Note, ...]


class Seen(Frozen):
    """A run finished since, outside what its law was fitted to: the loss seen beside the one predicted.

    `relative_error` is (predicted - seen) / seen; `inside` says whether the loss lies in the interval of one run.
    """

    run_id: str
    architecture: str
    n_params: float
    iterations: float
    loss: float
    predicted: float
    run95: Interval | None
    inside: bool | None
    relative_error: float
    size_factor: float
    budget_factor: float


@dataclass(frozen=True)
class Shortest:
    """The shortest run that may be proposed."""

    iterations: int = 1
    why: str = "a run has an iteration"
    """What forbids shorter ones."""


@dataclass(frozen=True)
class _FittedLaw:
    """An architecture's law at its estimate and every resample, and its residuals."""

    curve: Curve
    residual: Array
    notes: tuple[Note, ...]
    """On the fit: what is foreseen can be no better."""

    def foresee(self, asks: Sequence[Ask]) -> list[Prediction]:
        return predict(self.curve, asks, self.residual, 0)


def next_step(
    points: CheckedPoints,
    rates: Mapping[str, Mapping[float, float]],
    budget: float,
    *,
    law: str = "chinchilla",
    delta: float = 1e-3,
    shortest: Shortest = Shortest(),
) -> ScaleUp:
    """The best sizes for `budget` GPU-hours; `rates` are GPU-hours an iteration by architecture and n_params.

    Raises InputError for what cannot be fitted, for points without iterations, for a budget that is not above 0 or pays
    for no run as long as the shortest, and where fewer than two sizes of an architecture have a cost.
    """
    if not 0 < budget < float("inf"):
        raise InputError(f"--budget {budget:g}: must be above 0, in GPU-hours.")
    laws = _laws(points, law, delta)
    share = budget / len(laws)
    steps = tuple(_step(name, one, rates.get(name, {}), share, shortest) for name, one in laws.items())
    fitted = [
        Note(code=note.code, text=f"{wording.architecture(name)}: {note.text}")
        for name, one in laws.items()
        for note in one.notes
    ]
    return ScaleUp(
        law=law,
        huber_delta=delta,
        budget_gpu_hours=budget,
        runs=tuple(sorted(str(name) for name in points.frame["run_id"])),
        steps=steps,
        notes=(*fitted, *(note for step in steps for note in _notes(step, laws[step.architecture].curve))),
    )


def seen_since(points: CheckedPoints, former: ScaleUp) -> list[Seen]:
    """The runs finished since a proposal, and outside what it knew, against the law as it was.

    Raises InputError where too few of the runs it was made from are left to fit that law.
    """
    known = points.frame["run_id"].isin(former.runs)
    if known.all():
        return []
    if not known.any():
        raise InputError(f"none of the {len(former.runs)} runs it was made from is among the finished ones.")
    laws = _laws(replace(points, frame=points.frame[known]), former.law, former.huber_delta)
    found = []
    for name, one in laws.items():
        new = points.of(name)
        new = new[~new["run_id"].isin(former.runs)]
        asks = [
            Ask(float(n), float(iterations), "iterations")
            for n, iterations in zip(new["n_params"], new["iterations"], strict=True)
        ]
        for run_id, loss, foreseen in zip(new["run_id"], new["loss"], one.foresee(asks), strict=True):
            if max(foreseen.size_factor, foreseen.budget_factor) <= 1.0:
                continue
            ends = foreseen.run95
            found.append(
                Seen(
                    run_id=str(run_id),
                    architecture=name,
                    n_params=foreseen.n_params,
                    iterations=foreseen.iterations or 0.0,
                    loss=float(loss),
                    predicted=foreseen.loss,
                    run95=ends,
                    inside=None if ends is None else bool(ends[0] <= loss <= ends[1]),
                    relative_error=foreseen.loss / float(loss) - 1.0,
                    size_factor=foreseen.size_factor,
                    budget_factor=foreseen.budget_factor,
                )
            )
    return found


def seen_of(points: CheckedPoints, former: Sequence[ScaleUp]) -> tuple[list[Seen], list[str]]:
    """What has come of proposals, each run against the newest; with a sentence for each that can be held to nothing."""
    found: dict[str, Seen] = {}
    notes = []
    for one in former:
        try:
            found |= {seen.run_id: seen for seen in seen_since(points, one)}
        except InputError as error:
            notes.append(
                f"a proposal for {one.budget_gpu_hours:g} GPU-hours is compared with nothing: {error}"
            )
    return list(found.values()), notes


def former_steps(records: Sequence[Mapping[str, object]], where: str) -> list[ScaleUp]:
    """Proposals as they were kept, each with when it was made; raises InputError where one is no proposal."""
    try:
        return [
            ScaleUp.model_validate({key: value for key, value in record.items() if key != "made"})
            for record in records
        ]
    except ValidationError:
        raise InputError(
            f"{where}: is not a list of proposals as scale-up keeps them; move it away."
        ) from None


def _laws(points: CheckedPoints, law: str, delta: float) -> dict[str, _FittedLaw]:
    form = design_law(law)
    if points.frame["iterations"].isna().any():
        raise InputError("scale-up: a budget is spent in iterations, and the points have none in every row.")
    refuse(points, form, list(points.architectures), delta, None, RESAMPLES)
    fits = fit_all(points, form, delta)
    drawn = resample(fits, RESAMPLES, 0)
    return {
        fit.architecture: _FittedLaw(
            Curve(
                form,
                drawn.with_estimate(fit),
                points.of(fit.architecture),
            ),
            fit.residual,
            (
                *fit_notes(fit, points.of(fit.architecture), drawn, {}, {}),
                *effect_notes(size_effect(fit), None),
            ),
        )
        for fit in fits
    }


def _step(
    name: str, law: _FittedLaw, rates: Mapping[float, float], budget: float, shortest: Shortest
) -> Step:
    curve = law.curve
    if len(rates) < 2:
        raise InputError(
            f"scale-up: {name} has costs for {len(rates)} sizes; two are needed to cost a third by them."
        )
    smallest, largest = float(curve.sizes[0]), float(curve.sizes[-1])
    sizes = np.geomspace(smallest / BEYOND, largest * BEYOND, SIZES_TRIED)
    iterations_of = budget / _rate(rates, sizes)
    payable = iterations_of >= shortest.iterations * ROUNDING
    if not payable.any():
        raise InputError(
            f"--budget: {budget:.3g} GPU-hours for {name} pay at no size for the {shortest.iterations:,} iterations of "
            f"the shortest run ({shortest.why}); give a larger budget."
        )
    sizes, iterations_of = sizes[payable], iterations_of[payable]
    data = iterations_of if curve.law.counts_iterations else iterations_of * curve.tokens_an_iteration
    best = sizes[np.argmin(curve.losses_at(curve.params, sizes, data), axis=1)]
    n_params = _rounded(float(best[0]), 3)
    rate = float(_rate(rates, np.array([n_params]))[0])
    iterations = int(_rounded(budget / rate, 2))
    while iterations > 1 and iterations * rate > budget * (1 + 1e-9):
        iterations -= max(1, int(10 ** np.floor(np.log10(iterations) - 1)))
    iterations = max(shortest.iterations, iterations)
    (foreseen,) = law.foresee([Ask(n_params, float(iterations), "iterations")])
    return Step(
        architecture=name,
        n_params=n_params,
        n_params_ci95=interval(best[1:]),
        iterations=iterations,
        tokens=foreseen.tokens or 0.0,
        gpu_hours=iterations * rate,
        loss=foreseen.loss,
        ci95=foreseen.ci95,
        run95=foreseen.run95,
        size_factor=foreseen.size_factor,
        budget_factor=foreseen.budget_factor,
    )


def _rate(rates: Mapping[float, float], sizes: Array) -> Array:
    """GPU-hours an iteration of sizes: between those known a smooth curve in logarithms that never falls.

    Above the largest they grow in proportion, as arithmetic does: a slope between two measured steps, carried on a
    hundredfold, could make size free. Below the smallest the slope there goes on, but for the same reason from 0 to 1.
    """
    from scipy.interpolate import PchipInterpolator

    known = np.log(np.array(sorted(rates)))
    cost = np.maximum.accumulate(np.log(np.array([rates[size] for size in sorted(rates)])))
    curve = PchipInterpolator(known, cost)
    at = np.log(sizes)
    above, below = np.maximum(0.0, at - known[-1]), np.minimum(0.0, at - known[0])
    inside = curve(np.clip(at, known[0], known[-1]))
    out: Array = np.exp(inside + above + below * np.clip(float(curve.derivative()(known[0])), 0.0, 1.0))
    return out


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")


def _notes(step: Step, curve: Curve) -> list[Note]:
    name = wording.architecture(step.architecture)
    notes = []
    is_below = step.n_params < curve.sizes[0] or step.iterations < curve.frame["iterations"].min()
    reach = max(step.size_factor, step.budget_factor)
    if reach <= 1.0:
        text = f"the best for this budget lies within what {name} was trained on: a larger budget would teach more."
        notes.append(Note(code="within_range", text=text))
    if reach > EXTRAPOLATION_LIMIT:
        where, advice = (
            ("below", "give a larger budget") if is_below else ("beyond", "take a smaller step first")
        )
        text = f"{name} would go {wording.times(reach)} times {where} what was trained: {advice}."
        notes.append(Note(code="extrapolation_ratio", text=text))
    low, high = step.n_params_ci95
    if high > VAGUE * low:
        factor = wording.times(high / low)
        text = f"the best size of {name} is known to within {factor} times only: the loss near it is flat."
        notes.append(Note(code="optimum_vague", text=text))
    return notes
