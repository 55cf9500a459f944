"""The comparison of all architectures with the reference, and whether another way of counting would change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis import text as wording
from analysis.findings import curve as compare
from analysis.findings.equal_loss import Equal, TokenGain, equal_loss, headline, token_gains
from analysis.findings.note import Note
from analysis.findings.notes import obstacle
from analysis.findings.results import Comparison, ComputeGain, Convention, SizeRatio
from analysis.fitting.bootstrap import Fitted, Resamples, cluster_keys
from analysis.fitting.checks import size_effect
from analysis.fitting.shared_e import fit_shared
from analysis.fitting.solver import Problem, fit_law
from analysis.laws.law import Array, Law
from analysis.points.checks import pooled_sd, seed_noise

if TYPE_CHECKING:
    import pandas as pd

    from analysis.points.table import CheckedPoints

NON_EMBEDDING = "n_params_non_embedding"


@dataclass(frozen=True)
class Studied:
    """One architecture's fit with its points, its law at every resample, and whether size matters to it at all."""

    fit: Fitted
    frame: pd.DataFrame
    curve: compare.Curve
    size_effect: float | None

    @classmethod
    def of(cls, fit: Fitted, points: CheckedPoints, drawn: Resamples) -> Studied:
        """From a fit, its points and its resamples."""
        frame = points.of(fit.architecture)
        sd = pooled_sd(seed_noise(frame))
        effect = size_effect(fit, None if sd is None else sd / float(frame["loss"].mean()))
        params = np.vstack([[list(fit.result.params.values())], drawn.params[fit.architecture]])
        curve = compare.Curve(fit.problem.law, params, frame, obstacle(fit, effect))
        return cls(fit, frame, curve, effect)


def columns_of(frame: pd.DataFrame, law: Law) -> tuple[Array, Array]:
    """Inputs of a law (points, inputs) and losses (points)."""
    x = frame[list(law.inputs)].to_numpy(dtype=np.float64)
    return x, frame["loss"].to_numpy(dtype=np.float64)


def fit_all(points: CheckedPoints, law: Law, delta: float) -> list[Fitted]:
    """Each architecture fitted alone, or all at once where the law shares a parameter among them."""
    frames = [points.of(name) for name in points.architectures]
    problems = [Problem.of(law, *columns_of(frame, law), delta) for frame in frames]
    joint = fit_shared(problems) if law.shared and len(problems) > 1 else None
    fits = []
    for part, (name, frame, problem) in enumerate(zip(points.architectures, frames, problems, strict=True)):
        size = frame["n_params"].to_numpy(dtype=np.float64)
        seeds = frame["seed"].to_numpy(dtype=np.float64)
        cluster, keys = cluster_keys(size, seeds, [str(value) for value in frame["cluster"]])
        result = joint.result_of(part) if joint else fit_law(problem)
        fits.append(Fitted(name, problem, result, cluster, keys, size, joint, part))
    return fits


def comparison_of(
    studied: Mapping[str, Studied], base: str, delta: float, *, paired: bool
) -> tuple[Comparison, list[Note]]:
    """Size ratios, compute and token gains at equal loss, and notes on what they rest on."""
    inputs = studied[base].curve.law.inputs
    if len(studied) < 2 or "n_params" not in inputs:
        return _tables([], [], [], base, paired), []
    curves = {name: one.curve for name, one in studied.items()}
    rows = equal_loss(curves, base)
    gains = token_gains(curves, base) if len(inputs) > 1 else []
    conventions = _conventions(curves, rows, base, delta)
    notes = []
    if not paired:
        notes.append(
            Note(
                code="unpaired_resamples",
                text="the architectures were not trained on the same size rungs and seeds: their resamples "
                "pair only in part.",
            )
        )
    notes += _extrapolation_notes(rows)
    notes += [
        Note(
            code="convention_sensitive",
            text=f"the {one.quantity.replace('_', ' ')} of {wording.architecture(one.architecture)} is "
            f"{wording.times(one.value)} counted by {one.convention} and {wording.times(one.value_under)} by "
            f"{one.under}: the conclusion rests on the convention.",
        )
        for one in conventions
        if one.changes
    ]
    return _tables(rows, gains, conventions, base, paired), notes


def _conventions(
    curves: Mapping[str, compare.Curve], rows: list[Equal], base: str, delta: float
) -> list[Convention]:
    out = []
    again: dict[str, compare.Curve] | None = None
    for name in curves:
        row = headline(rows, name)
        if row is None or row.ratio is None:
            continue
        again = _recounted(curves, delta) if again is None else again
        other = _without_embeddings(again[name], again[base], row) if {name, base} <= set(again) else None
        if other is not None:
            out.append(_convention(name, "size_ratio", "n_params", row.ratio, row.ci95, NON_EMBEDDING, other))
        if row.gain is not None and row.n_params is not None:
            own = curves[name].tokens(row.iterations) if row.iterations is not None else row.tokens
            plain = row.reference_n_params * row.tokens / (row.n_params * own)
            out.append(
                _convention(
                    name, "compute_gain", "flops", row.gain, row.gain_ci95, "6 n_params tokens", plain
                )
            )
    return out


def _convention(
    name: str,
    quantity: str,
    convention: str,
    value: float,
    ends: tuple[float, float] | None,
    under: str,
    other: float,
) -> Convention:
    """It changes the conclusion where it turns fewer into more, or leaves the interval."""
    outside = ends is not None and not ends[0] <= other <= ends[1]
    return Convention.model_validate(
        {
            "architecture": name,
            "quantity": quantity,
            "convention": convention,
            "value": value,
            "under": under,
            "value_under": other,
            "changes": (value > 1) != (other > 1) or outside,
        }
    )


def _recounted(curves: Mapping[str, compare.Curve], delta: float) -> dict[str, compare.Curve]:
    """The laws fitted anew to sizes counted without embeddings, as those were; an uncounted one is left out."""
    frames = {
        name: one.frame.assign(n_params=one.frame[NON_EMBEDDING])
        for name, one in curves.items()
        if one.frame[NON_EMBEDDING].notna().all()
    }
    law = next(iter(curves.values())).law
    if law.shared and len(frames) < len(curves):
        return {}
    problems = [Problem.of(law, *columns_of(frame, law), delta) for frame in frames.values()]
    if law.shared and len(problems) > 1:
        joint = fit_shared(problems)
        results = [joint.result_of(part) for part in range(len(problems))]
    else:
        results = [fit_law(problem) for problem in problems]
    return {
        name: compare.Curve(law, np.array([list(result.params.values())]), frame)
        for (name, frame), result in zip(frames.items(), results, strict=True)
    }


def _without_embeddings(arm: compare.Curve, reference: compare.Curve, row: Equal) -> float | None:
    """The headline's size ratio by laws of sizes counted without embeddings; None where it has no number."""
    size = float(reference.sizes[-1])
    loss = reference.loss(size, reference.budget(row.iterations, row.tokens))
    found = float(compare.size_at(arm, loss, arm.budget(row.iterations, row.tokens))[0])
    return size / found if np.isfinite(found) and found > 1.0 else None


def _tables(
    rows: list[Equal], gains: list[TokenGain], conventions: list[Convention], base: str, paired: bool
) -> Comparison:
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
        token_gain=tuple(gains),
        conventions=tuple(conventions),
    )


def _extrapolation_notes(rows: list[Equal]) -> list[Note]:
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
