"""From checked points to the fitted study: every law, its intervals, its errors, its notes and the comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

from analysis import compare, heldout, uncertainty
from analysis.checks import seed_noise, trend_checks
from analysis.diagnostics import Note, exclusion_notes, fit_notes, obstacle
from analysis.errors import InputError
from analysis.fit import Problem, fit_law
from analysis.joint import fit_shared
from analysis.law import Array, Law
from analysis.laws import law_named
from analysis.points import CheckedPoints
from analysis.profile import Profile, profile
from analysis.results import (
    ArchitectureFit,
    Comparison,
    ComputeGain,
    FitDocument,
    HeldOut,
    HeldOutPoint,
    HeldOutSplit,
    ProfileCurve,
    Resampling,
    SizeRatio,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FitDocument", "SizeRatio", "fit_points"]

FEWEST_RESAMPLES = 100


def fit_points(
    points: CheckedPoints,
    *,
    law: str = "chinchilla",
    delta: float = 1e-3,
    reference: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> FitDocument:
    """Fit the law to each architecture, resample clusters, compare at equal loss.

    Raises InputError for an unknown law or reference, for a delta that is not positive, for missing
    iterations where the law needs them, and for fewer than 100 resamples.
    """
    form = law_named(law)
    names = list(points.architectures)
    _refuse(points, form, names, delta, reference, resamples)
    fits = _fit_all(points, form, delta)
    drawn = uncertainty.resample(fits, resamples, seed)
    architectures = {fit.architecture: _describe(fit, points, drawn) for fit in fits}
    base = reference or compare.default_reference(names)
    notes = list(exclusion_notes(Counter(item.code for item in points.exclusions)))
    if reference is None and len(names) > 1:
        notes.append(Note(code="default_reference", text=f"no reference was named; {base} was taken."))
    rows = _equal_loss(fits, points, drawn, base) if len(names) > 1 and "n_params" in form.inputs else []
    if rows and not drawn.paired:
        notes.append(
            Note(
                code="unpaired_resamples",
                text="the architectures were not trained on the same size rungs and seeds: their resamples "
                "pair only in part.",
            )
        )
    notes.extend(_extrapolation_notes(rows))
    document = FitDocument(
        law=form.name,
        formula=form.formula,
        huber_delta=delta,
        architectures=architectures,
        comparison=_comparison(rows, base, drawn.paired),
        resampling=Resampling(scheme=drawn.scheme, resamples=resamples, seed=seed),
        notes=tuple(notes),
        versions=_versions(),
    )
    document._draws.update(drawn.params)
    return document


def _refuse(
    points: CheckedPoints, law: Law, names: list[str], delta: float, reference: str | None, resamples: int
) -> None:
    if not 0 < delta < float("inf"):
        raise InputError(
            f"--delta {delta}: Huber's delta must be above 0, in units of log loss; 0.001 is usual."
        )
    if resamples < FEWEST_RESAMPLES:
        raise InputError(f"--resamples {resamples}: an interval needs at least {FEWEST_RESAMPLES} resamples.")
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


def _fit_all(points: CheckedPoints, law: Law, delta: float) -> list[uncertainty.Fitted]:
    """Each architecture fitted alone, or all at once where the law shares a parameter among them."""
    frames = [points.of(name) for name in points.architectures]
    problems = [Problem.of(law, *_columns(frame, law), delta) for frame in frames]
    joint = fit_shared(problems) if law.shared and len(problems) > 1 else None
    fits = []
    for part, (name, frame, problem) in enumerate(zip(points.architectures, frames, problems, strict=True)):
        size = frame["n_params"].to_numpy(dtype=np.float64)
        seeds = frame["seed"].to_numpy(dtype=np.float64)
        cluster, keys = uncertainty.cluster_keys(size, seeds, [str(value) for value in frame["cluster"]])
        result = joint.result_of(part) if joint else fit_law(problem)
        fits.append(uncertainty.Fitted(name, problem, result, cluster, keys, size, joint, part))
    return fits


def _columns(frame: pd.DataFrame, law: Law) -> tuple[Array, Array]:
    x = frame[list(law.inputs)].to_numpy(dtype=np.float64)
    return x, frame["loss"].to_numpy(dtype=np.float64)


def _describe(
    fit: uncertainty.Fitted, points: CheckedPoints, drawn: uncertainty.Resamples
) -> ArchitectureFit:
    frame, law, result = points.of(fit.architecture), fit.problem.law, fit.result
    x, loss = _columns(frame, law)
    splits: dict[str, heldout.Split | None] = {}
    for name, columns in (("largest_size", ("n_params",)), ("longest_budget", ("tokens", "iterations"))):
        found = [law.inputs.index(column) for column in columns if column in law.inputs]
        others = fit.joint.parts[: fit.part] + fit.joint.parts[fit.part + 1 :] if fit.joint else ()
        splits[name] = heldout.held_out(law, x, loss, fit.problem.delta, found[0], others) if found else None
    profiles = _profiles(fit)
    fitted = np.log(law.predict(result.u[None], fit.problem.z)[0])
    params = drawn.params[fit.architecture]
    return ArchitectureFit(
        params=result.params,
        objective=result.objective,
        n_points=len(frame),
        n_runs=int(frame["run_id"].nunique()),
        n_clusters=len(fit.keys),
        status=result.status,
        ci95={name: uncertainty.interval(params[:, j]) for j, name in enumerate(law.names)},
        heldout=HeldOut(
            in_sample_rms=float(np.sqrt(np.mean((np.exp(fitted - fit.problem.y) - 1.0) ** 2))),
            largest_size=_split(splits["largest_size"], frame, "n_params"),
            longest_budget=_split(splits["longest_budget"], frame, law.inputs[-1]),
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
        checks=tuple(trend_checks(fit.architecture, frame)),
        seed_noise=tuple(seed_noise(frame)),
        notes=tuple(fit_notes(fit, frame, drawn, profiles, splits)),
    )


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


def _equal_loss(
    fits: list[uncertainty.Fitted], points: CheckedPoints, drawn: uncertainty.Resamples, base: str
) -> list[compare.Equal]:
    curves: Mapping[str, compare.Curve] = {
        fit.architecture: compare.Curve(
            law=fit.problem.law,
            params=np.vstack([[list(fit.result.params.values())], drawn.params[fit.architecture]]),
            frame=points.of(fit.architecture),
            obstacle=obstacle(fit),
        )
        for fit in fits
    }
    return compare.equal_loss(curves, base)


def _comparison(rows: list[compare.Equal], base: str, paired: bool) -> Comparison:
    shared = ("architecture", "iterations", "tokens", "reference_n_params", "loss", "status")
    return Comparison(
        reference=base,
        n_convention="n_params",
        paired=paired,
        size_ratio=tuple(
            SizeRatio(
                n_params=row.n_params,
                ratio=row.ratio if row.status == "identified" else None,
                ci95=row.ci95 if row.status == "identified" else None,
                estimate=row.ratio,
                estimate_ci95=row.ci95,
                reason=row.reason,
                **{name: getattr(row, name) for name in shared},
            )
            for row in rows
        ),
        compute_gain=tuple(
            ComputeGain(
                reference_flops=row.reference_flops,
                flops=row.flops,
                gain=row.gain,
                ci95=row.gain_ci95,
                **{name: getattr(row, name) for name in shared},
            )
            for row in rows
            if row.gain is not None
        ),
    )


def _extrapolation_notes(rows: list[compare.Equal]) -> list[Note]:
    notes = []
    for code, status in (("extrapolation", "extrapolated"), ("ratio_not_identified", "not_identified")):
        hit = [row for row in rows if row.status == status]
        if hit:
            worst = max(hit, key=lambda row: (row.reference_n_params, row.tokens))
            notes.append(
                Note(
                    code=code,
                    text=f"{len(hit)} of {len(rows)} size ratios are {status.replace('_', ' ')}: {worst.reason}.",
                )
            )
    return notes


def _versions() -> dict[str, str]:
    out = {}
    for name in ("ssmscale", "numpy", "pandas"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out
