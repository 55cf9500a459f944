"""Fit a study: the law of every architecture with its intervals, errors and notes, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from analysis.errors import InputError
from analysis.findings.codebooks import compare_codebooks
from analysis.findings.comparison import FittedArchitecture, comparison_of, fit_all
from analysis.findings.curve import reference_of
from analysis.findings.isoflop import optima_notes, optimal_sizes
from analysis.findings.law_choice import (
    OTHER_RESAMPLES,
    alternatives,
    choose_law,
    law_notes,
    named,
    other_laws,
    try_law,
)
from analysis.findings.left_out import Splits, heldout_of
from analysis.findings.note import Note
from analysis.findings.notes import (
    OUTLIER_RULE,
    effect_notes,
    exclusion_notes,
    fit_notes,
    other_notes,
    outlier_notes,
    outliers,
    prediction_notes,
    rejected_because,
    rejection_notes,
)
from analysis.findings.predict import Ask, extension, other_points, predict
from analysis.findings.results import (
    ArchitectureFit,
    FitDocument,
    Resampling,
)
from analysis.fitting.bootstrap import (
    FEWEST_RESAMPLES,
    RESAMPLES,
    Fitted,
    Resamples,
    affordable,
    interval,
    noisy_losses,
    resample,
)
from analysis.fitting.held_out import drift_of
from analysis.fitting.patterns import pattern
from analysis.fitting.profile import Profile, profile
from analysis.laws.catalogue import laws_named, plainest
from analysis.laws.law import Law
from analysis.points.checks import seed_noise, size_times_data, trend_checks
from analysis.points.table import CheckedPoints, exclude, too_few

ISOFLOP_RESAMPLES = 400
MAX_ARCHITECTURES = 200


def fit_points(
    points: CheckedPoints,
    *,
    law: str = "chinchilla",
    delta: float | None = None,
    reference: str | None = None,
    resamples: int | None = None,
    seed: int = 0,
    asks: Sequence[Ask] = (),
    about: Sequence[Note] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> FitDocument:
    """Fit the law to each architecture, resample clusters, compare at equal loss and predict the `asks`.

    `law` is the name of one, FILE.py:NAME, several with commas, of which one is chosen, or auto (`laws_named`).
    Huber's `delta` follows from the noise unless it is given, as for a comparison with published fits.

    `about` holds notes on the origin of the points. Without `asks` twice and four times the largest trained size are
    predicted. `resamples` are by default 1000, fewer of more than 20,000 points. `progress` is called with what begins.
    Raises InputError for an unknown law or reference, a delta that is not positive, points that lack an input of the
    law, an architecture with too few points or one size, very many architectures, and fewer than 100 resamples.
    """
    forms = laws_named(law)
    base = reference_of(points.architectures, reference)
    usual = resamples is None
    resamples = affordable(len(points.frame)) if resamples is None else resamples
    if resamples < FEWEST_RESAMPLES:
        raise InputError(f"{resamples} resamples: an interval needs at least {FEWEST_RESAMPLES}.")
    refuse(points, plainest(forms), delta)
    progress(f"fitting {len(points.frame):,} points")
    if len(forms) > 1:
        tried, choice, others = choose_law(points, forms, delta, seed)
    else:
        tried = try_law(points, forms[0], delta, seed)
        choice, others = named(tried), alternatives(points, tried.fits, delta, seed)
    form, fits = tried.law, list(tried.fits)
    progress(f"refitting {resamples:,} resamples of {len(points.frame):,} points")
    drawn = resample(fits, resamples, seed)
    progress("comparing and checking the fits")
    rejected = rejected_because(form, tried.lacks)
    fitted = {fit.architecture: FittedArchitecture.of(fit, points, drawn, rejected) for fit in fits}
    notes = [
        *about,
        *points.notes,
        *exclusion_notes(points.exclusions),
        *rejection_notes(form, tried.lacks),
    ]
    if usual and resamples < RESAMPLES:
        text = (
            f"{len(points.frame):,} points are many: {resamples} resamples were made in place of {RESAMPLES}."
        )
        notes.append(Note("fewer_resamples", text))
    if reference is None and len(fits) > 1:
        notes.append(Note("default_reference", f"no reference was named; {base} was taken."))
    resampled = {
        name: noisy_losses(
            one.fit, drawn, min(resamples, affordable(len(one.fit.problem.y), ISOFLOP_RESAMPLES))
        )
        for name, one in fitted.items()
    }
    comparison, found = comparison_of(
        fitted, base, delta, paired=drawn.paired, seed=seed, resampled=resampled
    )
    notes.extend(found)
    codebooks, found = compare_codebooks(points, fitted, comparison, delta, seed)
    comparison = comparison.model_copy(update={"codebooks": codebooks})
    notes.extend(found)
    if len(fits) > 1 and form.size:
        more = other_laws(points, others, comparison, seed, OTHER_RESAMPLES if len(forms) > 1 else 0)
        comparison = comparison.model_copy(update={"other_laws": tuple(more)})
        notes.extend(law_notes(form, comparison))
    isoflop = {}
    for name, one in fitted.items():
        isoflop[name] = optimal_sizes(one.curve, resampled[name])
        notes.extend(optima_notes(name, isoflop[name]))
    document = FitDocument(
        law=form.name,
        formula=form.formula,
        huber_delta=fits[0].problem.delta,
        delta_rule="noise" if delta is None else "fixed",
        architectures={
            name: _describe(one, points, drawn, asks, tried.splits[name]) for name, one in fitted.items()
        },
        comparison=comparison,
        isoflop=isoflop,
        points="annealed" if points.annealed else "unannealed",
        resampling=Resampling(scheme=drawn.scheme, resamples=resamples, seed=seed),
        notes=tuple(notes),
        versions={name: installed(name) or "not installed" for name in ("ssmscale", "numpy", "pandas")},
        exclusions=points.exclusions,
        law_choice=choice,
    )
    document._draws.update(drawn.params)
    return document


def drop_outliers(
    points: CheckedPoints, *, law: str = "chinchilla", delta: float | None = None
) -> CheckedPoints:
    """Return the points without outliers from the law fitted to all of them; raises as `fit_points` does."""
    form = plainest(laws_named(law))
    refuse(points, form, delta)
    fits = fit_all(points.frames, form, delta)
    off = {place for fit in fits for place in points.ordered(fit.architecture).index[outliers(fit)]}
    hit = points.frame.index.to_series().isin(off)
    kept, excluded = exclude(points.frame, hit, "outlier", OUTLIER_RULE)
    return replace(points, frame=kept.reset_index(drop=True), exclusions=(*points.exclusions, *excluded))


def refuse(points: CheckedPoints, law: Law, delta: float | None) -> None:
    """Raise InputError for a delta that is not positive, and for points to which the law cannot be fitted."""
    if delta is not None and not 0 < delta < float("inf"):
        raise InputError(
            f"--delta {delta}: Huber's delta must be above 0, in units of log loss; published fits use 0.001."
        )
    if len(points.architectures) > MAX_ARCHITECTURES:
        raise InputError(
            f"the table has {len(points.architectures):,} architectures, and at most {MAX_ARCHITECTURES} are fitted; "
            "give the column that names them by --column architecture=NAME."
        )
    for column in law.columns:
        missing = points.frame[points.frame[column].isna()]
        if len(missing):
            raise InputError(
                f"row {missing['row'].iloc[0]}, column {column}: is empty; law {law.name} needs it in every row."
            )
    for name in points.architectures:
        rows = points.of(name)
        for reason in (too_few(rows, law), *(one.refusal(rows) for one in law.inputs if one.refusal)):
            if reason:
                raise InputError(f"{reason}.")


def _describe(
    one: FittedArchitecture, points: CheckedPoints, drawn: Resamples, asks: Sequence[Ask], splits: Splits
) -> ArchitectureFit:
    fit, frame = one.fit, one.curve.frame
    law, result = fit.problem.law, fit.result
    profiles = _profiles(fit)
    residual = fit.ordinary_residual
    params = drawn.params[fit.architecture]
    drift = None
    if one.curve.rejected_because:
        drift = drift_of(splits.get("compute"), np.log(size_times_data(frame)))
    predictions = tuple(predict(one.curve, asks or extension(one.curve), residual, drawn.seed, drift))
    others = other_points(one.curve, points)
    return ArchitectureFit(
        params=result.params,
        objective=result.objective,
        n_points=len(frame),
        n_runs=int(frame["run_id"].nunique()),
        n_clusters=len(fit.keys),
        status=result.status,
        ci95={name: interval(params[:, j]) for j, name in enumerate(law.names)},
        heldout=heldout_of(fit, frame, splits),
        profile=profiles,
        size_effect_p=one.size_effect,
        predictions=predictions,
        other_points=others,
        checks=tuple(trend_checks(fit.architecture, frame)),
        seed_noise=tuple(seed_noise(frame)),
        notes=(
            *fit_notes(fit, frame, drawn, profiles, splits),
            *outlier_notes(fit, points),
            *effect_notes(one.size_effect, pattern([fit], drawn.seed)),
            *prediction_notes(predictions),
            *other_notes(others),
        ),
    )


def _profiles(fit: Fitted) -> dict[str, Profile]:
    """Profile each parameter; in a joint fit only those that centring does not change."""
    law, joint = fit.problem.law, fit.joint
    if joint is None:
        names = [name for name in law.names if name not in law.unit_bound]
        return {name: profile(fit.problem, fit.result, name) for name in names}
    own = dict(zip(law.names, joint.own(fit.part), strict=True))
    return {name: profile(joint.problem, joint.result, own[name]) for name in ("E", *law.nonlinear)}


def installed(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
