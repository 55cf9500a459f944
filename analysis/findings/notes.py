"""Notes on a fit, each with a code for programs and a sentence for readers: all that can make its numbers misleading.

A note names the points that lie much further from their law than the others. They are left out only on request: Huber's
loss keeps one such point from bending a law.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from analysis import text as wording
from analysis.findings.note import Note
from analysis.findings.predict import EXTRAPOLATION_LIMIT, Prediction
from analysis.fitting.bootstrap import FEW_CLUSTERS, FEWEST_SIZES, Fitted, Resamples
from analysis.fitting.checks import SIGNIFICANT, Pattern, Split, freedom
from analysis.fitting.profile import Profile
from analysis.fitting.scale import DIVERGED_RULE, robust_scale
from analysis.laws.law import SIZE
from analysis.points.checks import data_column, seed_noise

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pandas as pd

    from analysis.findings.predict import OtherPoints
    from analysis.points.table import CheckedPoints, Exclusion

MAX_CORRELATION = 0.95
MAX_SHARE_AT_BOUND = 0.05
MAX_NAMED = 5

OUTLIER_DEVIATIONS = 10.0
OUTLIER_RESIDUAL = 0.01
OUTLIER_RULE = (
    f"more than {OUTLIER_DEVIATIONS:g} robust standard deviations (1.4826 times the median absolute residual of the "
    "log loss, less as many of the smallest as the law has parameters) "
    f"and more than {100 * OUTLIER_RESIDUAL:g} % off the law of its architecture"
)
LEFT_OUT = {
    "annealed": "taken after the learning rate decayed, left out of a fit of points taken mid-run",
    "duplicate": "repeating an earlier row, left out of the fit",
    "outlier": "far off the law of the others, left out of the fit as requested",
    "unannealed": "taken before the learning rate decayed, left out of the fit",
    "unfinished": "of runs that did not finish, left out of the fit",
    "unusable": "without a result, since a cell is empty, NaN, zero or infinite, left out of the fit",
}


def fit_notes(
    fit: Fitted,
    frame: pd.DataFrame,
    resamples: Resamples,
    profiles: Mapping[str, Profile],
    splits: Mapping[str, Split | None],
) -> Iterator[Note]:
    """Yield all notes on the design, the solution, the held-out errors and the intervals of one architecture."""
    yield from design_notes(fit, frame)
    yield from _solution_notes(fit, resamples, profiles)
    yield from _heldout_notes(splits)
    yield from resample_notes(fit, resamples, frame)


def exclusion_notes(exclusions: Sequence[Exclusion]) -> Iterator[Note]:
    """Yield a note for each reason that set rows aside, with their number."""
    found = Counter(item.code for item in exclusions)
    for code, why in LEFT_OUT.items():
        if count := found[code]:
            yield Note(f"{code}_points", f"{count} row{'s' if count > 1 else ''} {why}.")
    for reason in dict.fromkeys(item.reason for item in exclusions if item.code == "too_few"):
        yield Note("architecture_left_out", f"{reason}; it was left out.")


def effect_notes(size_effect: float | None, pattern: Pattern | None) -> Iterator[Note]:
    """Yield notes on a size without a measurable effect, and on a pattern in the residuals."""
    if size_effect is not None and size_effect > SIGNIFICANT:
        text = f"no effect of size on the loss can be measured (p = {size_effect:.2g}): no size ratio can be read off."
        yield Note("no_size_effect", text)
    if pattern is not None:
        yield Note(
            "structured_residuals",
            f"the residuals follow a pattern that the law lacks ({pattern.term}; {100 * pattern.size:.2g} % "
            f"of the loss, p = {pattern.p:.2g}): do not extrapolate it far.",
        )


def prediction_notes(predictions: Sequence[Prediction]) -> Iterator[Note]:
    """Yield a note on predictions far beyond the points."""
    size = max((one.size_factor for one in predictions), default=1.0)
    data = max((one.budget_factor for one in predictions), default=1.0)
    if max(size, data) > EXTRAPOLATION_LIMIT:
        yield Note(
            "extrapolation_ratio",
            f"predictions reach {wording.times(size)} times beyond the trained sizes and {wording.times(data)} times "
            "beyond the trained budgets: the held-out errors do not reach so far.",
        )


def other_notes(others: OtherPoints | None) -> Iterator[Note]:
    """Yield a note on the distance from the law to points of the other kind."""
    if others is not None:
        kind = "taken mid-run" if others.kind == "unannealed" else "annealed"
        side = "above" if others.mean_relative_difference > 0 else "below"
        yield Note(
            f"{others.kind}_gap",
            f"{others.points} points {kind} lie {100 * abs(others.mean_relative_difference):.2g} % {side} this law on "
            "average; the fit does not use them.",
        )


def flat_profiles(profiles: Mapping[str, Profile]) -> Iterator[Note]:
    """Yield a note for each parameter whose profile has an open end."""
    for name, curve in profiles.items():
        sides = zip(("below", "above"), curve.interval, strict=True)
        if open_sides := " and ".join(side for side, end in sides if end is None):
            text = (
                f"the objective is flat in {name} {open_sides} its estimate: the interval has no end there."
            )
            yield Note("flat_profile", text)


def correlation(fit: Fitted) -> float:
    """Return the correlation of ln N and ln D over an architecture's points; 0 if either does not vary."""
    z = fit.problem.z[:, fit.problem.law.axes]
    if z.shape[1] < 2 or len(z) < 3 or float(z.std(axis=0).min()) == 0.0:
        return 0.0
    return float(np.asarray(np.corrcoef(z.T))[0, 1])


def unidentified_because(fit: Fitted, size_effect: float | None = None) -> str:
    """Return why a fit identifies no size, or an empty string."""
    name = wording.architecture(fit.architecture)
    if len(np.unique(fit.size)) < FEWEST_SIZES:
        return f"{name} was trained at fewer than {FEWEST_SIZES} sizes"
    if freedom(fit) <= 0:
        return f"the law of {name} has as many parameters as points"
    if size_effect is not None and size_effect > SIGNIFICANT:
        return f"size has no measurable effect on the loss of {name}"
    if fit.result.status == "abnormal":
        return f"the fit of {name} failed"
    if fit.result.status == "bound_hit":
        return f"the fit of {name} ends on a bound of a parameter"
    if abs(correlation(fit)) > MAX_CORRELATION:
        return f"size and data of {name} vary together"
    return ""


def design_notes(fit: Fitted, frame: pd.DataFrame) -> Iterator[Note]:
    """Yield notes on what the trained grid can identify; all are known before training."""
    law, n = fit.problem.law, len(fit.problem.y)
    if n <= len(law.names):
        yield Note("too_few_points", f"{n} points for {len(law.names)} parameters: no error can be measured.")
    sizes = frame["n_params"].nunique()
    if law.size and sizes < FEWEST_SIZES:
        yield Note("too_few_sizes", f"{sizes} sizes cannot identify E, A and alpha; train at least 3.")
    # An input without a term of its own, such as unique tokens, may be the same in all rows.
    for coefficient, (column, exponent) in law.scaled.items():
        values = frame[column].nunique()
        if column != SIZE.column and values < FEWEST_SIZES:
            text = f"{values} values of {column} cannot identify {coefficient} and {exponent}; train 3."
            yield Note("too_few_budgets", text)
    if not law.size and sizes > 1:
        text = f"{sizes} sizes are pooled in a law without size; fit each size alone, or use a law of size."
        yield Note("pooled_sizes", text)
    if not law.data and frame["tokens"].nunique() > 1:
        text = "several budgets are pooled in a law without data; keep one, or use a law of size and data."
        yield Note("pooled_budgets", text)
    r = correlation(fit)
    if abs(r) > MAX_CORRELATION:
        yield Note(
            "collinear",
            f"ln N and ln D are correlated at {r:.3f}: size and data cannot be told apart; "
            "train sizes at several budgets each.",
        )


def _solution_notes(fit: Fitted, resamples: Resamples, profiles: Mapping[str, Profile]) -> Iterator[Note]:
    result = fit.result
    if result.at_bound:
        where = ", ".join(f"{name} = {result.params[name]:.4g}" for name in result.at_bound)
        yield Note("bound_hit", f"the optimum lies on a bound ({where}): not an interior fit.")
    if result.status == "max_iter":
        yield Note("max_iter", "the solver reached its iteration limit before it settled.")
    lowest = float(np.exp(fit.problem.y.min()))
    E = result.params["E"]
    if not 0.0 < E < lowest:
        yield Note(
            "e_out_of_range",
            f"E = {E:.4g} nats is not between 0 and the lowest loss seen ({lowest:.4f}): "
            "the irreducible loss is not identified.",
        )
    yield from flat_profiles(profiles)
    share = resamples.at_bound[fit.architecture]
    if share > MAX_SHARE_AT_BOUND:
        yield Note("resamples_at_bound", f"{share:.0%} of the resampled fits end on a bound of a parameter.")


def _heldout_notes(splits: Mapping[str, Split | None]) -> Iterator[Note]:
    for axis, split in splits.items():
        what = {"size": "largest size", "data": "longest budget"}[axis]
        if split is None:
            yield Note("no_heldout", f"the {what} cannot be left out: nothing else would remain.")
        elif not split.determined:
            yield Note(
                "heldout_underdetermined",
                f"without the {what} fewer than 3 sizes or budgets remain, which do not determine the law that "
                "predicts it.",
            )


def resample_notes(fit: Fitted, resamples: Resamples, frame: pd.DataFrame) -> Iterator[Note]:
    """Yield notes on how the intervals were made, and on noise that is not measured."""
    clusters = len(fit.keys)
    if clusters < FEW_CLUSTERS:
        yield Note(
            "few_clusters", f"{clusters} independent series: intervals have Student's tails and are rough."
        )
    if resamples.scheme == "wild":
        yield Note(
            "wild_bootstrap",
            "neighbouring points of a series are alike beyond a common shift, as of points taken mid-run: a wild "
            "cluster bootstrap was used, whose intervals are wider.",
        )
    if not seed_noise(frame):
        yield Note(
            "no_seed_replicates",
            f"no size was trained to the same {data_column(frame)} under two seeds: noise between seeds is "
            "not measured.",
        )


def outliers(fit: Fitted) -> list[int]:
    """Return the indices of an architecture's rows (in the order of CheckedPoints.of) that are outliers by the rule."""
    residual = np.abs(fit.residual)
    scale = robust_scale(residual, len(fit.problem.law.names))
    off = (residual > OUTLIER_DEVIATIONS * scale) & (residual > OUTLIER_RESIDUAL)
    return [int(index) for index in np.flatnonzero(off)]


def outlier_notes(fit: Fitted, points: CheckedPoints) -> Iterator[Note]:
    """Yield notes that name an architecture's points that diverged, and its other outliers, if it has any."""
    names = points.of(fit.architecture)["run_id"]
    gone = [] if fit.problem.left_out is None else np.flatnonzero(fit.problem.left_out).tolist()
    if gone:
        text = (
            f"{len(gone)} of {len(fit.problem.y)} points lie {DIVERGED_RULE} and have no weight in its fit: "
            f"{_named(names.iloc[gone])}."
        )
        yield Note("diverged_points", text)
    off = [index for index in outliers(fit) if index not in gone]
    if off:
        yield Note(
            "outliers",
            f"{len(off)} of {len(fit.problem.y)} points lie {OUTLIER_RULE}: {_named(names.iloc[off])}; "
            "--drop-outliers leaves them out.",
        )


def _named(names: pd.Series[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"
