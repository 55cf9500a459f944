"""From checked points to the fitted study: every law, its intervals, its errors, its notes and the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import InputError
from analysis.findings import curve as compare
from analysis.findings.comparison import Studied, columns_of, comparison_of, fit_all
from analysis.findings.isoflop import optimal_sizes
from analysis.findings.note import Note
from analysis.findings.notes import (
    effect_notes,
    exclusion_notes,
    fit_notes,
    other_notes,
    outlier_notes,
    prediction_notes,
    without_outliers,
)
from analysis.findings.predict import Ask, extension, other_points, predict
from analysis.findings.results import (
    ArchitectureFit,
    FitDocument,
    HeldOut,
    HeldOutPoint,
    HeldOutSplit,
    ProfileCurve,
    Resampling,
)
from analysis.fitting import bootstrap as uncertainty
from analysis.fitting import checks as heldout
from analysis.fitting.checks import pattern
from analysis.fitting.profile import Profile, profile
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array, Law
from analysis.points.checks import seed_noise, trend_checks
from analysis.points.table import CheckedPoints, too_few

if TYPE_CHECKING:
    import pandas as pd


FEWEST_RESAMPLES = 100
ISOFLOP_RESAMPLES = 400


def fit_points(
    points: CheckedPoints,
    *,
    law: str = "chinchilla",
    delta: float = 1e-3,
    reference: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    asks: Sequence[Ask] = (),
    about: Sequence[Note] = (),
) -> FitDocument:
    """Fit the law to each architecture, resample clusters, compare at equal loss, predict what is asked for.

    `about` holds notes on where the points come from. Without `asks` twice and four times the largest trained size are
    predicted. Raises InputError for an unknown law or reference, for a delta that is not positive, for what the law
    needs and the points lack, for an architecture with too few points or one size, and for fewer than 100 resamples.
    """
    form = law_named(law)
    names = list(points.architectures)
    refuse(points, form, names, delta, reference, resamples)
    fits = fit_all(points, form, delta)
    drawn = uncertainty.resample(fits, resamples, seed)
    studied = {fit.architecture: Studied.of(fit, points, drawn) for fit in fits}
    base = reference or compare.default_reference(names)
    notes = [*about, *exclusion_notes(points.exclusions)]
    if reference is None and len(names) > 1:
        notes.append(Note(code="default_reference", text=f"no reference was named; {base} was taken."))
    comparison, found = comparison_of(studied, base, delta, paired=drawn.paired)
    notes.extend(found)
    document = FitDocument(
        law=form.name,
        formula=form.formula,
        huber_delta=delta,
        architectures={name: _describe(one, points, drawn, asks) for name, one in studied.items()},
        comparison=comparison,
        isoflop={name: optimal_sizes(one.curve, _redrawn(one, seed)) for name, one in studied.items()},
        points="annealed" if points.annealed else "unannealed",
        resampling=Resampling(scheme=drawn.scheme, resamples=resamples, seed=seed),
        notes=tuple(notes),
        versions=_versions(),
    )
    document._draws.update(drawn.params)
    return document


def drop_outliers(points: CheckedPoints, *, law: str = "chinchilla", delta: float = 1e-3) -> CheckedPoints:
    """The points less those far off the law fitted to all of them; raises what `fit_points` does."""
    form = law_named(law)
    refuse(points, form, list(points.architectures), delta, None, FEWEST_RESAMPLES)
    return without_outliers(points, fit_all(points, form, delta))


def _redrawn(one: Studied, seed: int) -> Array:
    """Log losses as another study might have had them (resamples, points), for the intervals of IsoFLOP sizes."""
    return uncertainty.wild_losses(one.fit, ISOFLOP_RESAMPLES, seed)


def refuse(
    points: CheckedPoints, law: Law, names: list[str], delta: float, reference: str | None, resamples: int
) -> None:
    """Raise InputError for what `fit_points` cannot use."""
    if not 0 < delta < float("inf"):
        raise InputError(
            f"--delta {delta}: Huber's delta must be above 0, in units of log loss; 0.001 is usual."
        )
    if resamples < FEWEST_RESAMPLES:
        raise InputError(f"{resamples} resamples: an interval needs at least {FEWEST_RESAMPLES}.")
    if reference is not None and reference not in names:
        raise InputError(
            f"--reference {reference}: no such architecture among the points; they hold {', '.join(names)}."
        )
    for column in law.inputs:
        missing = points.frame[points.frame[column].isna()]
        if len(missing):
            raise InputError(
                f"row {missing['row'].iloc[0]}, column {column}: empty, but law {law.name} needs it in every row."
            )
    for name in names:
        reason = too_few(points.of(name), law)
        if reason:
            raise InputError(f"{reason}.")
        own = points.of(name)
        if "unique_tokens" in law.inputs and not (own["tokens"] > own["unique_tokens"]).any():
            raise InputError(
                f"row {own['row'].iloc[0]}, column unique_tokens: no row of {name} has seen its data twice, so what a "
                "repetition is worth cannot be fitted; take --law chinchilla."
            )


def _describe(
    one: Studied, points: CheckedPoints, drawn: uncertainty.Resamples, asks: Sequence[Ask]
) -> ArchitectureFit:
    fit, frame = one.fit, one.frame
    law, result = fit.problem.law, fit.result
    splits = _splits(one)
    profiles = _profiles(fit)
    residual = fit.residual
    params = drawn.params[fit.architecture]
    predictions = tuple(predict(one.curve, asks or extension(one.curve), residual, drawn.seed))
    others = other_points(one.curve, points)
    return ArchitectureFit(
        params=result.params,
        objective=result.objective,
        n_points=len(frame),
        n_runs=int(frame["run_id"].nunique()),
        n_clusters=len(fit.keys),
        status=result.status,
        ci95={name: uncertainty.interval(params[:, j]) for j, name in enumerate(law.names)},
        heldout=HeldOut(
            in_sample_rms=float(np.sqrt(np.mean((np.exp(-residual) - 1.0) ** 2))),
            largest_size=_split(splits.get("largest_size"), frame, "n_params"),
            longest_budget=_split(splits.get("longest_budget"), frame, _data_column(law)),
        ),
        profile={
            name: ProfileCurve(
                values=tuple(curve.values.tolist()),
                objective=tuple(curve.objective.tolist()),
                allowed=curve.allowed,
                interval=curve.interval,
            )
            for name, curve in profiles.items()
        },
        size_effect_p=one.size_effect,
        predictions=predictions,
        other_points=others,
        checks=tuple(trend_checks(fit.architecture, frame)),
        seed_noise=tuple(seed_noise(frame)),
        notes=(
            *fit_notes(fit, frame, drawn, profiles, splits),
            *outlier_notes(fit, points),
            *effect_notes(one.size_effect, pattern(fit, drawn.seed)),
            *prediction_notes(predictions),
            *other_notes(others),
        ),
    )


def _data_column(law: Law) -> str:
    return "iterations" if "iterations" in law.inputs else "tokens"


def _splits(one: Studied) -> dict[str, heldout.Split | None]:
    """What the fit predicts of the top of each input that its law has; None where nothing else would remain."""
    fit = one.fit
    law, joint = fit.problem.law, fit.joint
    x, loss = columns_of(one.frame, law)
    others = joint.parts[: fit.part] + joint.parts[fit.part + 1 :] if joint else ()
    return {
        name: heldout.held_out(law, x, loss, fit.problem.delta, law.inputs.index(column), others)
        for name, column in (("largest_size", "n_params"), ("longest_budget", _data_column(law)))
        if column in law.inputs
    }


def _profiles(fit: uncertainty.Fitted) -> dict[str, Profile]:
    """A profile of each parameter; in a joint fit, of those that no centring shifts."""
    law, joint = fit.problem.law, fit.joint
    if joint is None:
        return {name: profile(fit.problem, fit.result, name) for name in law.names}
    own = dict(zip(law.names, joint.own(fit.part), strict=True))
    return {name: profile(joint.problem, joint.result, own[name]) for name in ("E", *law.nonlinear)}


def _split(split: heldout.Split | None, frame: pd.DataFrame, column: str) -> HeldOutSplit | None:
    if split is None:
        return None
    rows = frame[split.left_out]
    return HeldOutSplit(
        column=column,
        threshold=split.threshold,
        status=split.status,
        determined=split.determined,
        mean_relative_error=float(split.relative_error.mean()),
        rms_relative_error=float(np.sqrt(np.mean(split.relative_error**2))),
        points=tuple(
            HeldOutPoint(
                run_id=str(run_id),
                n_params=float(n_params),
                tokens=float(tokens),
                iterations=None if np.isnan(iterations) else float(iterations),
                loss=float(loss),
                predicted=float(predicted),
                relative_error=float(error),
            )
            for run_id, n_params, tokens, iterations, loss, predicted, error in zip(
                rows["run_id"],
                rows["n_params"],
                rows["tokens"],
                rows["iterations"].astype(float),
                rows["loss"],
                split.predicted,
                split.relative_error,
                strict=True,
            )
        ),
    )


def _versions() -> dict[str, str]:
    out = {}
    for name in ("ssmscale", "numpy", "pandas"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out
