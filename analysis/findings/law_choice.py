"""Choose a law by its prediction of the largest compute, which none of the tried laws was fitted to.

A law is admissible if its fit of every architecture is an interior optimum, if something can be left out that the rest
determines, and if the residuals of all architectures together show no pattern. Of the admissible laws the one with the
least error on the largest compute wins, unless a law with fewer parameters is worse by no more than two standard
errors of the difference: then the simplest such law does. (Breiman et al. 1984 take one; here the points left out share
the fit that predicts them, which an error from the scatter between series does not count.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from analysis import text as wording
from analysis.errors import InputError
from analysis.findings.comparison import Comparison, OtherLaw, fit_all
from analysis.findings.curve import Curve, Rung
from analysis.findings.equal_loss import compare_at, headline_of
from analysis.findings.left_out import Splits, in_sample_rms, splits_of
from analysis.findings.note import Note
from analysis.findings.notes import described, rejected_because, unidentified_because
from analysis.findings.results import LawChoice, LawTrial
from analysis.fitting.bootstrap import Fitted, affordable, resample
from analysis.fitting.held_out import far_off
from analysis.fitting.patterns import Pattern, pattern
from analysis.laws.catalogue import AUTOMATIC
from analysis.laws.law import Array, Law

if TYPE_CHECKING:
    from analysis.points.table import CheckedPoints

OTHER_RESAMPLES = 400
STANDARD_ERRORS = 2.0
MANY_POINTS, MANY_ARCHITECTURES = 2000, 12
"""Above either, other laws are fitted only on request."""


@dataclass(frozen=True)
class Tried:
    """A law fitted to all architectures, what it lacks, and its predictions of what was left out."""

    law: Law
    fits: Sequence[Fitted]
    lacks: Pattern | None
    splits: Mapping[str, Splits]

    def errors(self, what: str) -> Array | None:
        """Return the log errors on the points left out, of all architectures; None unless all have such points."""
        found = [one.get(what) for one in self.splits.values()]
        if any(split is None for split in found):
            return None
        return np.concatenate([np.log1p(split.relative_error) for split in found if split is not None])

    def series(self, what: str) -> NDArray[np.int64]:
        """Return the number of the series of each point left out, over all architectures."""
        out, first = [], 0
        for fit in self.fits:
            split = self.splits[fit.architecture][what]
            assert split is not None
            out.append(fit.cluster[split.left_out] + first)
            first += len(fit.keys)
        return np.concatenate(out)

    @property
    def inadmissible_because(self) -> str:
        """Reason why the law is not admissible, or an empty string."""
        for fit in self.fits:
            if fit.result.status != "converged":
                return unidentified_because(fit) or f"the fit of {fit.architecture} has not settled"
            if len(fit.problem.y) <= len(self.law.names):
                return (
                    f"{fit.architecture} has {len(fit.problem.y)} points for {len(self.law.names)} parameters"
                )
        if self.lacks is not None and self.lacks.rejects:
            return f"its residuals have a pattern ({described(self.lacks)})"
        return ""


def try_law(points: CheckedPoints, law: Law, delta: float | None, seed: int) -> Tried:
    """Fit a law to every architecture, judge its residuals, and predict what is left out."""
    fits = fit_all(points.frames, law, delta)
    splits = {fit.architecture: splits_of(fit, points.of(fit.architecture)) for fit in fits}
    return Tried(law, fits, pattern(fits, seed), splits)


def choose_law(
    points: CheckedPoints, laws: Sequence[Law], delta: float | None, seed: int
) -> tuple[Tried, LawChoice, list[Tried]]:
    """Try each of the laws that the points have the columns for; return the chosen one, the reasons, and the others.

    The others are those that are admissible too. Raises InputError if the points lack a column of every law.
    """
    usable = [law for law in laws if not points.frame[list(law.columns)].isna().any(axis=None)]
    if not usable:
        needed = " or ".join(sorted({", ".join(law.columns) for law in laws}))
        raise InputError(f"--law: some row lacks an input of each law to choose from; they need {needed}.")
    tried = sorted((try_law(points, law, delta, seed) for law in usable), key=lambda one: len(one.law.names))
    able = [one for one in tried if not one.inadmissible_because]
    settled = [one for one in tried if all(fit.result.status == "converged" for fit in one.fits)]
    chosen, why = _chosen(able or settled or tried[:1])
    if not able:
        why = f"no law is admissible; {why}"
    choice = LawChoice(
        asked=tuple(law.name for law in laws),
        chosen=chosen.law.name,
        reason=why,
        laws=tuple(_trial(one) for one in tried),
    )
    return chosen, choice, [one for one in able if one is not chosen]


def named(tried: Tried) -> LawChoice:
    """Return the errors of a law that was named, which none was chosen against."""
    name = tried.law.name
    return LawChoice(asked=(name,), chosen=name, reason=f"{name} was named", laws=(_trial(tried),))


def other_laws(
    points: CheckedPoints, others: Sequence[Tried], comparison: Comparison, seed: int, resamples: int = 0
) -> list[OtherLaw]:
    """Return the size ratios of other laws at each headline's size and budget; with resamples they have intervals."""
    base, out = comparison.reference, []
    names = [name for name in points.architectures if name != base]
    heads = {name: headline_of(comparison.size_ratio, name) for name in names}
    for one in others:
        count = affordable(len(points.frame), resamples)
        drawn = resample(one.fits, count, seed) if resamples else None
        rejected = rejected_because(one.law, one.lacks)
        curves = {}
        for fit in one.fits:
            params = drawn.with_estimate(fit) if drawn else np.array([list(fit.result.params.values())])
            frame, reason = points.of(fit.architecture), unidentified_because(fit)
            curves[fit.architecture] = Curve(one.law, params, frame, reason, rejected)
        for name, row in heads.items():
            if row is not None:
                at = Rung(row.reference_n_params, row.iterations, row.tokens)
                found = compare_at({name: curves[name], base: curves[base]}, base, at)
                out.append(OtherLaw.of(one.law.name, found[name].ratio))
    return out


def alternatives(
    points: CheckedPoints, fits: Sequence[Fitted], delta: float | None, seed: int
) -> list[Tried]:
    """Return the admissible laws of size and data beside that of `fits`, fitted to all points and nothing left out.

    Empty for a law with other inputs, and where their fits would take long.
    """
    law = fits[0].problem.law
    few = len(points.frame) <= MANY_POINTS and 1 < len(points.architectures) <= MANY_ARCHITECTURES
    if not few or law.inputs != AUTOMATIC[0].inputs:
        return []
    tried = []
    for one in AUTOMATIC:
        if one.name != law.name:
            others = fit_all(points.frames, one, delta, fits)
            tried.append(Tried(one, others, pattern(others, seed), {}))
    return [one for one in tried if not one.inadmissible_because]


def law_notes(law: Law, comparison: Comparison) -> Iterator[Note]:
    """Yield a note where the headline's size ratio depends on the choice among admissible laws."""
    for row in comparison.size_ratio:
        others = [
            one
            for one in comparison.other_laws
            if (one.architecture, one.tokens, one.reference_n_params)
            == (row.architecture, row.tokens, row.reference_n_params)
            and one.ratio is not None
        ]
        ends = row.estimate_ci95
        off = [one for one in others if one.ratio and ends and not ends[0] <= one.ratio <= ends[1]]
        if off:
            said = " and ".join(f"{wording.times(one.ratio or 0.0)} by {one.law}" for one in off)
            yield Note(
                "law_dependent",
                f"the size ratio of {wording.architecture(row.architecture)} depends on the law: it is "
                f"{wording.times(row.estimate or 0.0)} by {law.name} and, outside its interval, {said}, which the "
                "points do not reject.",
            )


def _chosen(able: Sequence[Tried]) -> tuple[Tried, str]:
    """Return the law with the least error on the largest compute, or a simpler one that is hardly worse, and why."""
    judged = [(one, error) for one in able if (error := one.errors("compute")) is not None]
    if not judged:
        return able[
            0
        ], f"{able[0].law.name} is the simplest: no runs of the largest compute could be left out"
    same = [pair for pair in judged if len(pair[1]) == len(judged[0][1])]
    # A run that diverged is far off every law.
    kept = ~np.logical_and.reduce([far_off(error) for _, error in same])
    of = {one.law.name: error[kept] ** 2 for one, error in same}
    best = min((one for one, _ in same), key=lambda one: float(of[one.law.name].mean()))
    series = best.series("compute")[kept]

    def worse(one: Tried) -> tuple[float, float]:
        difference = of[one.law.name] - of[best.law.name]
        return float(difference.mean()), _standard_error(difference, series)

    within = [one for one, _ in same if worse(one)[0] <= STANDARD_ERRORS * worse(one)[1]]
    chosen = min([*within, best], key=lambda one: len(one.law.names))
    rms = {name: 100 * float(np.sqrt(values.mean())) for name, values in of.items()}
    listed = ", ".join(f"{name} by {value:.2g} %" for name, value in rms.items())
    missed = f"the largest compute was missed by: {listed} (root mean square)"
    if len(same) == 1:
        return chosen, f"{chosen.law.name} is the only admissible law that can be judged; {missed}"
    if chosen is best:
        return chosen, f"{best.law.name} predicts what was left out best; {missed}"
    gap, deviation = worse(chosen)
    return chosen, (
        f"{chosen.law.name} has fewer parameters than {best.law.name}, whose squared error is lower by "
        f"{gap / deviation if deviation else 0.0:.1f} standard errors only; {missed}"
    )


def _standard_error(values: Array, series: NDArray[np.int64]) -> float:
    """Return the standard error of the mean of values (points) that are correlated within a series."""
    _, own = np.unique(series, return_inverse=True)
    sums = np.bincount(own, values - values.mean())
    count = len(sums)
    return float(np.sqrt(count / max(1, count - 1) * (sums**2).sum())) / len(values)


def _trial(one: Tried) -> LawTrial:
    errors = {what: one.errors(what) for what in ("size", "data", "compute")}
    rms = {
        what: None if error is None else float(np.sqrt(np.mean(error[~far_off(error)] ** 2)))
        for what, error in errors.items()
    }
    points = np.array([len(fit.problem.y) for fit in one.fits])
    inside = np.array([in_sample_rms(fit) for fit in one.fits])
    statuses = [fit.result.status for fit in one.fits if fit.result.status != "converged"]
    return LawTrial(
        law=one.law.name,
        formula=one.law.formula,
        parameters=len(one.law.names),
        status=statuses[0] if statuses else "converged",
        in_sample_rms=float(np.sqrt((points * inside**2).sum() / points.sum())),
        largest_size_rms=rms["size"],
        longest_budget_rms=rms["data"],
        largest_compute_rms=rms["compute"],
        pattern=one.lacks.term if one.lacks else None,
        pattern_p=one.lacks.p if one.lacks else None,
        admissible=not one.inadmissible_because,
        reason=one.inadmissible_because,
    )
