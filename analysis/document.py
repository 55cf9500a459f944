"""The fitted study as one document: what `fit --json` prints and what a report is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PrivateAttr

from analysis import compare, heldout, uncertainty
from analysis.checks import SeedNoise, TrendCheck, seed_noise, trend_checks
from analysis.diagnostics import Note, exclusion_notes, fit_notes, obstacle
from analysis.errors import InputError
from analysis.fit import Problem, Status, fit_law
from analysis.laws import Array, Law, law_named
from analysis.points import CheckedPoints

if TYPE_CHECKING:
    import pandas as pd

Interval = tuple[float, float]
FEWEST_RESAMPLES = 100


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeldOutPoint(_Frozen):
    """A point left out of a fit, with the loss that fit predicts for it."""

    run_id: str
    n_params: float
    tokens: float
    iterations: float | None
    loss: float
    predicted: float
    relative_error: float


class HeldOutSplit(_Frozen):
    """Error of a fit on the points at and above `threshold` of `column`, none of which it saw."""

    column: str
    threshold: float
    status: Status
    determined: bool
    mean_relative_error: float
    rms_relative_error: float
    points: tuple[HeldOutPoint, ...]


class HeldOut(_Frozen):
    """Held-out errors, beside the in-sample one that they should be read against."""

    in_sample_rms: float
    largest_size: HeldOutSplit | None
    longest_budget: HeldOutSplit | None


class ProfileCurve(_Frozen):
    """Objective minimised over all else at each value; an open end of `interval` is null."""

    values: tuple[float, ...]
    objective: tuple[float, ...]
    interval: tuple[float | None, float | None]


class ArchitectureFit(_Frozen):
    """One architecture's law, how its fit ended, intervals, held-out error and notes."""

    params: dict[str, float]
    objective: float
    n_points: int
    n_runs: int
    n_clusters: int
    status: Status
    ci95: dict[str, Interval]
    heldout: HeldOut
    profile: dict[str, ProfileCurve]
    checks: tuple[TrendCheck, ...]
    seed_noise: tuple[SeedNoise, ...]
    notes: tuple[Note, ...]


class SizeRatio(_Frozen):
    """N_ref / N' at equal loss and budget.

    `ratio` and `ci95` are null unless the ratio is identified. `estimate` is what the laws give even where the
    equal size lies outside the trained ones; an end of 0 in an interval means that some resamples never reach the loss.
    """

    architecture: str
    iterations: float | None
    tokens: float
    reference_n_params: float
    loss: float
    n_params: float | None
    ratio: float | None
    ci95: Interval | None
    estimate: float | None
    estimate_ci95: Interval | None
    status: compare.Verdict
    reason: str


class ComputeGain(_Frozen):
    """Training FLOPs of the reference over those of the architecture at equal loss and budget."""

    architecture: str
    iterations: float | None
    tokens: float
    reference_n_params: float
    loss: float
    reference_flops: float | None
    flops: float | None
    gain: float | None
    ci95: Interval | None
    status: compare.Verdict


class Comparison(_Frozen):
    """Every architecture against the reference."""

    reference: str
    n_convention: str
    paired: bool
    size_ratio: tuple[SizeRatio, ...]
    compute_gain: tuple[ComputeGain, ...]


class Resampling(_Frozen):
    """How the intervals were made: enough to make them again."""

    scheme: Literal["cluster", "wild"]
    resamples: int
    seed: int


class FitDocument(_Frozen):
    """The whole result; `model_dump(mode="json")` is what `fit --json` prints."""

    law: str
    formula: str
    huber_delta: float
    architectures: dict[str, ArchitectureFit]
    comparison: Comparison
    resampling: Resampling
    notes: tuple[Note, ...]
    versions: dict[str, str]

    _draws: dict[str, Array] = PrivateAttr(default_factory=dict)

    @property
    def formula_data_symbol(self) -> str:
        """T where the law counts iterations, D where it counts tokens."""
        return "T" if law_named(self.law).inputs[-1] == "iterations" else "D"

    def draws(self, architecture: str) -> Array:
        """Parameters at every resample (resamples, parameters); empty when the document was read from a file."""
        width = len(self.architectures[architecture].params)
        return self._draws.get(architecture, np.empty((0, width)))


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
    fits = [_fit_one(points, form, name, delta) for name in names]
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


def _fit_one(points: CheckedPoints, law: Law, name: str, delta: float) -> uncertainty.Fitted:
    frame = points.of(name)
    x, loss = _columns(frame, law)
    problem = Problem.of(law, x, loss, delta)
    size = frame["n_params"].to_numpy(dtype=np.float64)
    seeds = frame["seed"].to_numpy(dtype=np.float64)
    cluster, keys = uncertainty.cluster_keys(size, seeds, [str(value) for value in frame["cluster"]])
    return uncertainty.Fitted(name, problem, fit_law(problem), cluster, keys, size)


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
        splits[name] = heldout.held_out(law, x, loss, fit.problem.delta, found[0]) if found else None
    shapes = ("E", *law.nonlinear)
    profiles = {name: uncertainty.profile(fit.problem, result, name) for name in shapes}
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
                interval=curve.interval,
            )
            for name, curve in profiles.items()
        },
        checks=tuple(trend_checks(fit.architecture, frame)),
        seed_noise=tuple(seed_noise(frame)),
        notes=tuple(fit_notes(fit, frame, drawn, profiles, splits)),
    )


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
