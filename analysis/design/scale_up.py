"""Scale-up: the next run for a budget of GPU-hours with its predicted loss, and later the comparison with its loss.

A proposal has for each architecture the size that its law makes best for its share of the budget: a larger model trains
for fewer iterations. The comparison uses the law of the time of the proposal, fitted to the runs that existed then.
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
from analysis.findings.left_out import splits_of
from analysis.findings.note import Frozen, Note
from analysis.findings.notes import effect_notes, fit_notes, rejected_because
from analysis.findings.predict import EXTRAPOLATION_LIMIT, Ask, predict
from analysis.fitting.bootstrap import interval, resample
from analysis.fitting.checks import size_effect
from analysis.fitting.held_out import Drift, drift_of
from analysis.fitting.patterns import pattern
from analysis.laws.law import Array, Interval
from analysis.points.checks import size_times_data
from analysis.points.table import CheckedPoints

SIZES_TRIED = 600
BEYOND = 300.0
"""Factor above the largest trained size, and below the smallest, up to which sizes are tried."""
ROUNDING = 1.02
"""Reserve for the rounding of a size to three digits, which may raise its cost."""
VAGUE = 10.0
RESAMPLES = 1000


class Step(Frozen):
    """One architecture's next run: the best size for the budget with its interval, and its predicted loss.

    `ci95` is the interval of the law, `run95` that of one run. The factors say how far the run lies beyond the trained
    range, and `in_support` whether it lies among the trained sizes and budgets together.
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
    compute_factor: float
    in_support: bool


class ScaleUp(Frozen):
    """A proposal for a budget that the architectures share evenly, made from the finished `runs`."""

    law: str
    huber_delta: float
    budget_gpu_hours: float
    runs: tuple[str, ...]
    steps: tuple[Step, ...]
    notes: tuple[Note, ...]


class Seen(Frozen):
    """A run that finished after a proposal, beyond the range of its law: the loss seen and the loss predicted.

    `relative_error` is (predicted - seen) / seen; `inside` is true if the loss lies in the interval of one run.
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
class _FittedLaw:
    """An architecture's law at its estimate and every resample, its residuals, its notes, and its error if rejected."""

    curve: Curve
    residual: Array
    notes: tuple[Note, ...]
    delta: float
    drift: Drift | None


def next_step(
    points: CheckedPoints,
    rates: Mapping[str, Mapping[float, float]],
    budget: float,
    *,
    law: str = "chinchilla",
    delta: float | None = None,
    shortest: int = 1,
    shortest_because: str = "a run has an iteration",
) -> ScaleUp:
    """Propose the best sizes for `budget` GPU-hours; `rates` are GPU-hours an iteration by architecture and n_params.

    No run has fewer iterations than `shortest`, for the reason given with it.

    Raises InputError for points that cannot be fitted or have no iterations, for a budget that is not above 0 or too
    small for the shortest run, and if fewer than two sizes of an architecture have a cost.
    """
    if not 0 < budget < float("inf"):
        raise InputError(f"--budget {budget:g}: must be above 0, in GPU-hours.")
    laws = _laws(points, law, delta)
    share = budget / len(laws)
    steps = []
    for name, one in laws.items():
        known = rates.get(name, {})
        if len(known) < 2:
            raise InputError(
                f"scale-up: {name} has costs for {len(known)} sizes; at least two are needed to cost other sizes."
            )
        step = _step(name, one, known, share, shortest)
        if step is None:
            raise InputError(
                f"--budget: {share:.3g} GPU-hours for {name} are too few at every size for the {shortest:,} "
                f"iterations of the shortest run ({shortest_because}); give a larger budget."
            )
        steps.append(step)
    fitted = [
        Note(note.code, f"{wording.architecture(name)}: {note.text}")
        for name, one in laws.items()
        for note in one.notes
    ]
    return ScaleUp(
        law=law,
        huber_delta=next(iter(laws.values())).delta,
        budget_gpu_hours=budget,
        runs=tuple(sorted(str(name) for name in points.frame["run_id"])),
        steps=tuple(steps),
        notes=(*fitted, *(note for step in steps for note in _notes(step, laws[step.architecture].curve))),
    )


def seen_since(points: CheckedPoints, former: ScaleUp) -> list[Seen]:
    """Compare the runs that finished after a proposal, beyond the range of its law, with that law.

    Raises InputError if too few of the proposal's runs are left to fit the law.
    """
    known = points.frame["run_id"].isin(former.runs)
    if known.all():
        return []
    if not known.any():
        raise InputError(
            f"none of the {len(former.runs)} runs from which it was made is among the finished ones."
        )
    laws = _laws(replace(points, frame=points.frame[known]), former.law, former.huber_delta)
    found = []
    for name, one in laws.items():
        new = points.of(name)
        new = new[~new["run_id"].isin(former.runs)]
        asks = [
            Ask(float(n), float(iterations), "iterations")
            for n, iterations in zip(new["n_params"], new["iterations"], strict=True)
        ]
        predictions = predict(one.curve, asks, one.residual, 0, one.drift)
        for run_id, loss, predicted in zip(new["run_id"], new["loss"], predictions, strict=True):
            if max(predicted.size_factor, predicted.budget_factor) <= 1.0:
                continue
            ends = predicted.run95
            found.append(
                Seen(
                    run_id=str(run_id),
                    architecture=name,
                    n_params=predicted.n_params,
                    iterations=predicted.iterations or 0.0,
                    loss=float(loss),
                    predicted=predicted.loss,
                    run95=ends,
                    inside=None if ends is None else bool(ends[0] <= loss <= ends[1]),
                    relative_error=predicted.loss / float(loss) - 1.0,
                    size_factor=predicted.size_factor,
                    budget_factor=predicted.budget_factor,
                )
            )
    return found


def seen_of(points: CheckedPoints, former: Sequence[ScaleUp]) -> tuple[list[Seen], list[str]]:
    """Return the runs seen since proposals, each with the newest; and a sentence for each that cannot be compared."""
    found: dict[str, Seen] = {}
    notes = []
    for one in former:
        try:
            found |= {seen.run_id: seen for seen in seen_since(points, one)}
        except InputError as error:
            notes.append(f"a proposal for {one.budget_gpu_hours:g} GPU-hours cannot be compared: {error}")
    return list(found.values()), notes


def former_steps(records: Sequence[Mapping[str, object]], where: str) -> list[ScaleUp]:
    """Read proposals from their records, without the time of each; raises InputError if one is not a proposal."""
    try:
        return [
            ScaleUp.model_validate({key: record[key] for key in record if key != "made"})
            for record in records
        ]
    except ValidationError:
        raise InputError(f"{where}: is not a list of the proposals of scale-up; move it away.") from None


def _laws(points: CheckedPoints, law: str, delta: float | None) -> dict[str, _FittedLaw]:
    form = design_law(law)
    if points.frame["iterations"].isna().any():
        raise InputError("scale-up: a budget is spent in iterations, and some points have none.")
    refuse(points, form, delta)
    fits = fit_all(points.frames, form, delta)
    drawn = resample(fits, RESAMPLES, 0)
    lacks = pattern(fits, 0)
    laws = {}
    for fit in fits:
        frame = points.of(fit.architecture)
        notes = (*fit_notes(fit, frame, drawn, {}, {}), *effect_notes(size_effect(fit), None))
        drift = None
        if reason := rejected_because(form, lacks):
            notes = (*notes, Note("law_rejected", f"{reason}."))
            drift = drift_of(splits_of(fit, frame).get("compute"), np.log(size_times_data(frame)))
        curve = Curve(form, drawn.with_estimate(fit), frame)
        delta = fit.problem.delta
        laws[fit.architecture] = _FittedLaw(curve, fit.ordinary_residual, notes, delta, drift)
    return laws


def _step(
    name: str, law: _FittedLaw, rates: Mapping[float, float], budget: float, shortest: int
) -> Step | None:
    """Return an architecture's next run; None if the budget does not pay for the shortest run at any size."""
    curve = law.curve
    smallest, largest = float(curve.sizes[0]), float(curve.sizes[-1])
    sizes = np.geomspace(smallest / BEYOND, largest * BEYOND, SIZES_TRIED)
    iterations_of = budget / _rate(rates, sizes)
    payable = iterations_of >= shortest * ROUNDING
    if not payable.any():
        return None
    sizes, iterations_of = sizes[payable], iterations_of[payable]
    data = iterations_of if curve.law.counts_iterations else iterations_of * curve.tokens_an_iteration
    best = sizes[np.argmin(curve.losses_at(curve.params, sizes, data), axis=1)]
    n_params = _rounded(float(best[0]), 3)
    rate = float(_rate(rates, np.array([n_params]))[0])
    iterations = int(_rounded(budget / rate, 2))
    while iterations > 1 and iterations * rate > budget * (1 + 1e-9):
        iterations -= max(1, int(10 ** np.floor(np.log10(iterations) - 1)))
    iterations = max(shortest, iterations)
    (predicted,) = predict(
        curve, [Ask(n_params, float(iterations), "iterations")], law.residual, 0, law.drift
    )
    return Step(
        architecture=name,
        n_params_ci95=interval(best[1:]),
        gpu_hours=iterations * rate,
        **vars(predicted) | {"iterations": iterations, "tokens": predicted.tokens or 0.0},
    )


def _rate(rates: Mapping[float, float], sizes: Array) -> Array:
    """Return the GPU-hours an iteration of sizes: between known ones a smooth curve in logarithms that never falls.

    Above the largest they grow in proportion to size, as arithmetic does: a measured slope, extrapolated a hundredfold,
    could make size free. Below the smallest the slope there continues, limited to 0 to 1 for the same reason.
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
        text = f"the best run for this budget lies in the trained range of {name}: a larger budget would show more."
        notes.append(Note("within_range", text))
    if reach > EXTRAPOLATION_LIMIT:
        where, advice = (
            ("below", "give a larger budget") if is_below else ("above", "take a smaller step first")
        )
        text = f"the run of {name} lies {wording.times(reach)} times {where} the trained range: {advice}."
        notes.append(Note("extrapolation_ratio", text))
    low, high = step.n_params_ci95
    if high > VAGUE * low:
        factor = wording.times(high / low)
        text = f"the best size of {name} is known only within a factor of {factor}: the loss near it is flat."
        notes.append(Note("optimum_vague", text))
    return notes
