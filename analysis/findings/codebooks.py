"""The comparison of architectures by the loss of each codebook, at the size and budget of the headline.

The loss is a mean over codebooks. One architecture may model the first ones better, which carry the coarse sound, and
another one the rest: their mean hides that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

from analysis import text as wording
from analysis.findings.comparison import CodebookComparison, Comparison, FittedArchitecture, fit_all
from analysis.findings.curve import Curve, Rung, central, rungs
from analysis.findings.equal_loss import compare_at, headline_of
from analysis.findings.note import Note
from analysis.fitting.bootstrap import affordable, resample
from analysis.laws.law import Array
from analysis.points.table import CheckedPoints

CODEBOOK_RESAMPLES = 100
"""Resamples of each codebook's laws: fewer than of the mean's, since codebooks are many; their intervals are rough."""


def compare_codebooks(
    points: CheckedPoints,
    fitted: Mapping[str, FittedArchitecture],
    comparison: Comparison,
    delta: float | None,
    seed: int,
) -> tuple[tuple[CodebookComparison, ...], list[Note]]:
    """Fit each codebook's losses by the law of the mean, and compare the architectures as the headline does.

    Returns no comparison of a codebook whose loss some row lacks, and a note for it.
    """
    whole = {name: one.curve for name, one in fitted.items()}
    base, law = comparison.reference, whole[comparison.reference].law
    rung = _headline(comparison, whole)
    by_mean = {name: _loss(curve, rung) for name, curve in whole.items()}
    found, notes = [], []
    for name in points.codebooks:
        missing = int(points.frame[name].isna().sum())
        if missing:
            text = f"{name} is empty in {missing} of {len(points.frame)} rows: this codebook is not compared."
            notes.append(Note("codebook_incomplete", text))
            continue
        own = replace(points, frame=points.frame.assign(loss=points.frame[name]))
        fits = fit_all(own.frames, law, delta)
        drawn = resample(fits, affordable(len(own.frame), CODEBOOK_RESAMPLES), seed)
        arms = {fit.architecture: FittedArchitecture.of(fit, own, drawn) for fit in fits}
        curves = {arm: one.curve for arm, one in arms.items()}
        losses = {arm: _loss(curve, rung) for arm, curve in curves.items()}
        ratios = compare_at(curves, base, rung) if comparison.size_ratio else {}
        found.append(
            CodebookComparison(
                codebook=name,
                params={arm: one.fit.result.params for arm, one in arms.items()},
                loss={arm: float(values[0]) for arm, values in losses.items()},
                ranking=_ranking(losses),
                size_ratio=tuple(one.ratio for one in ratios.values()),
            )
        )
        if _ranking(losses) != _ranking(by_mean):
            budget = wording.budget(rung.iterations, rung.tokens)
            place = f"{wording.human(rung.n_params)} parameters and {budget}"
            notes.append(_otherwise(name, losses, by_mean, place))
    return tuple(found), notes


def _headline(comparison: Comparison, curves: Mapping[str, Curve]) -> Rung:
    """Return where the headline compares, or the reference's rung of the largest compute if there are no ratios."""
    row = headline_of(comparison.size_ratio)
    if row is not None:
        return Rung(row.reference_n_params, row.iterations, row.tokens)
    every = rungs(curves[comparison.reference], curves)
    return max(every, key=lambda rung: (rung.n_params * rung.tokens, rung.n_params))


def _loss(curve: Curve, rung: Rung) -> Array:
    """Return the loss in nats (1 + resamples) of one architecture at a size and budget."""
    return curve.loss(rung.n_params, curve.data(rung.iterations, rung.tokens))


def _ranking(losses: Mapping[str, Array]) -> tuple[str, ...]:
    return tuple(sorted(losses, key=lambda name: float(losses[name][0])))


def _otherwise(name: str, losses: Mapping[str, Array], by_mean: Mapping[str, Array], place: str) -> Note:
    """Name the pair that a codebook orders otherwise than the mean does, with the largest difference of its losses."""
    swapped = [
        (one, other) if losses[one][0] < losses[other][0] else (other, one)
        for one, other in combinations(losses, 2)
        if (losses[one][0] < losses[other][0]) != (by_mean[one][0] < by_mean[other][0])
    ]
    better, worse = max(swapped, key=lambda pair: float(losses[pair[1]][0] - losses[pair[0]][0]))
    difference = losses[worse] - losses[better]
    ends = central(difference)
    clear = "" if ends is None or ends[0] <= 0 else ", by more than the noise"
    noise = "; the difference lies within the noise" if not clear else ""
    return Note(
        "codebooks_rank_otherwise",
        f"by {name}, {wording.architecture(better)} has a lower loss than {wording.architecture(worse)} at {place} "
        f"({losses[better][0]:.4f} and {losses[worse][0]:.4f} nats){clear}, and by the mean of the codebooks a higher "
        f"one{noise}.",
    )
