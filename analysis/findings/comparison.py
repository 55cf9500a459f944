"""The comparison of all architectures with the reference, also under other conventions of counting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from analysis import text as wording
from analysis.findings.curve import Curve, size_at
from analysis.findings.equal_loss import (
    AtEqualLoss,
    Compared,
    ComputeGain,
    SizeRatio,
    TokenGain,
    Verdict,
    headline_of,
    size_ratios,
    token_gains,
)
from analysis.findings.frontier import FrontierGain, frontier_gains
from analysis.findings.local_curves import ModelFree, model_free
from analysis.findings.note import Frozen, Note
from analysis.findings.notes import unidentified_because
from analysis.fitting.bootstrap import Fitted, Resamples, cluster_keys
from analysis.fitting.checks import size_effect
from analysis.fitting.scale import delta_of, diverged
from analysis.fitting.shared_e import fit_shared
from analysis.fitting.solver import FitResult, Problem, fit_from, fit_law
from analysis.laws.law import Array, Interval, Law
from analysis.points.checks import pooled_sd, seed_noise

if TYPE_CHECKING:
    import pandas as pd

    from analysis.points.table import CheckedPoints

NON_EMBEDDING = "n_params_non_embedding"
PILOT_DELTA = 1e-3
"""Delta of the fit from whose residuals delta follows: below any noise of training, where outliers move it least."""


@dataclass(frozen=True)
class Convention:
    """A headline figure under two conventions of counting; `changes` if they differ in the conclusion."""

    architecture: str
    quantity: Literal["size_ratio", "compute_gain"]
    convention: str
    value: float
    under: str
    value_under: float
    changes: bool


class CodebookComparison(Frozen):
    """Laws of one codebook's loss, and its loss and size ratio for each architecture where the headline is read.

    `ranking` has the architectures in the order of their `loss` (nats a token), the lowest first. `size_ratio` has
    those of the headline's size and budget; a ratio may not be identified for a codebook.
    """

    codebook: str
    params: dict[str, dict[str, float]]
    loss: dict[str, float]
    ranking: tuple[str, ...]
    size_ratio: tuple[SizeRatio, ...]


class OtherLaw(AtEqualLoss):
    """The size ratio of another admissible law at the headline's size and budget; `ci95` is null without resamples."""

    law: str
    ratio: float | None
    ci95: Interval | None
    status: Verdict
    reason: str

    @classmethod
    def of(cls, law: str, row: SizeRatio) -> OtherLaw:
        """Return a law's size ratio, identified or not."""
        at = row.model_dump(include=set(AtEqualLoss.model_fields))
        verdict = row.model_dump(include={"status", "reason"})
        return cls(**at, **verdict, law=law, ratio=row.estimate, ci95=row.estimate_ci95)


class Comparison(Frozen):
    """All architectures against the reference."""

    reference: str
    n_convention: str
    paired: bool
    size_ratio: tuple[SizeRatio, ...]
    compute_gain: tuple[ComputeGain, ...]
    token_gain: tuple[TokenGain, ...]
    conventions: tuple[Convention, ...]
    model_free: tuple[ModelFree, ...] = ()
    """Size ratios by smoothed losses, in the order of `size_ratio`."""
    frontier_gain: tuple[FrontierGain, ...] = ()
    codebooks: tuple[CodebookComparison, ...] = ()
    other_laws: tuple[OtherLaw, ...] = ()


@dataclass(frozen=True)
class FittedArchitecture:
    """One architecture's fit, its law at every resample with its points, and the p-value of its effect of size."""

    fit: Fitted
    curve: Curve
    size_effect: float | None

    @classmethod
    def of(
        cls, fit: Fitted, points: CheckedPoints, drawn: Resamples, rejected: str = ""
    ) -> FittedArchitecture:
        """Join a fit with its points and its resamples; `rejected` says why the law is rejected, if it is."""
        frame = points.of(fit.architecture)
        sd = pooled_sd(seed_noise(frame))
        effect = size_effect(fit, None if sd is None else sd / float(frame["loss"].mean()))
        reason = unidentified_because(fit, effect)
        return cls(fit, Curve(fit.problem.law, drawn.with_estimate(fit), frame, reason, rejected), effect)


def fit_all(
    frames: Mapping[str, pd.DataFrame], law: Law, delta: float | None = None, known: Sequence[Fitted] = ()
) -> list[Fitted]:
    """Fit the rows of each architecture alone, or all at once if the law shares a parameter among them.

    Without `delta` it follows from the noise (`scale.delta_of`), and points that diverged have no weight. `known` are
    fits of other laws to the same points: a law that contains one of those starts from its fit.
    """
    problems = [
        Problem.of(law, law.x(frame), frame["loss"].to_numpy(dtype=np.float64), delta or PILOT_DELTA)
        for frame in frames.values()
    ]
    simpler = {fit.architecture: fit.result for fit in known if fit.problem.law is law.simpler}
    pilots = None
    if delta is None and problems:
        pilots = [fit_law(problem, simpler.get(name)) for name, problem in zip(frames, problems, strict=True)]
        problems = _by_noise(problems, pilots)
    joint = fit_shared(problems) if law.shared and len(problems) > 1 else None
    fits = []
    for part, (name, frame) in enumerate(frames.items()):
        if joint:
            result = joint.result_of(part)
        elif pilots:
            result = fit_from(problems[part], pilots[part].rivals)
        else:
            result = fit_law(problems[part], simpler.get(name))
        size = frame["n_params"].to_numpy(dtype=np.float64)
        seeds = frame["seed"].to_numpy(dtype=np.float64)
        cluster, keys = cluster_keys(size, seeds, [str(value) for value in frame["cluster"]])
        fits.append(Fitted(name, problems[part], result, cluster, keys, size, joint, part))
    return fits


def _by_noise(problems: Sequence[Problem], pilots: Sequence[FitResult]) -> list[Problem]:
    """Return the problems with the delta of their common noise, without the points that diverged."""
    law = problems[0].law
    residuals = [
        problem.y - np.log(law.predict(pilot.u[None], problem.z)[0])
        for problem, pilot in zip(problems, pilots, strict=True)
    ]
    delta = delta_of(residuals, len(law.names))
    return [
        replace(problem, delta=delta, left_out=diverged(residual, len(law.names)))
        for problem, residual in zip(problems, residuals, strict=True)
    ]


def comparison_of(
    fitted: Mapping[str, FittedArchitecture],
    base: str,
    delta: float | None,
    *,
    paired: bool,
    seed: int = 0,
    resampled: Mapping[str, Array] | None = None,
) -> tuple[Comparison, list[Note]]:
    """Return size ratios, compute, token and frontier gains at equal loss, and notes on their limits.

    `resampled` are log losses (resamples, points) of each architecture, for what they show along the frontier.
    """
    law = fitted[base].curve.law
    compared = len(fitted) > 1 and law.size is not None
    curves = {name: one.curve for name, one in fitted.items()}
    found = size_ratios(curves, base) if compared else []
    comparison = Comparison(
        reference=base,
        n_convention="n_params",
        paired=paired,
        size_ratio=tuple(one.ratio for one in found),
        compute_gain=tuple(one.gain for one in found if one.gain is not None),
        token_gain=tuple(token_gains(curves, base)) if compared and law.data else (),
        conventions=tuple(_conventions(curves, found, base, delta)),
        model_free=tuple(model_free(curves, base, found, seed)),
        frontier_gain=tuple(frontier_gains(curves, base, resampled)) if compared else (),
    )
    return comparison, _notes(comparison) if compared else []


def _notes(comparison: Comparison) -> list[Note]:
    notes = []
    if not comparison.paired:
        text = "the architectures were not trained on the same size rungs and seeds: their resamples pair only in part."
        notes.append(Note("unpaired_resamples", text))
    rows = comparison.size_ratio
    for code, status in (("extrapolation", "extrapolated"), ("ratio_not_identified", "not_identified")):
        hit = [row for row in rows if row.status == status]
        if hit:
            worst = max(hit, key=lambda row: (row.reference_n_params, row.tokens))
            text = f"{len(hit)} of {len(rows)} size ratios are {status.replace('_', ' ')}: {worst.reason}."
            notes.append(Note(code, text))
    apart = dict.fromkeys(one.architecture for one in comparison.model_free if one.disagrees)
    notes.extend(Note("model_free_disagrees", _apart(comparison, name)) for name in apart)
    for one in comparison.conventions:
        if one.changes:
            text = (
                f"the {one.quantity.replace('_', ' ')} of {wording.architecture(one.architecture)} is "
                f"{wording.times(one.value)} counted by {one.convention} and {wording.times(one.value_under)} by "
                f"{one.under}: the conclusion depends on the convention."
            )
            notes.append(Note("convention_sensitive", text))
    return notes


def _apart(comparison: Comparison, name: str) -> str:
    """Write where an architecture's ratios by the law and by smoothed losses differ, at the headline if there."""
    pairs = [
        pair for pair in zip(comparison.size_ratio, comparison.model_free, strict=True) if pair[1].disagrees
    ]
    own = [pair for pair in pairs if pair[0].architecture == name]
    both = sum(one.architecture == name and one.ratio is not None for one in comparison.model_free)
    head = headline_of(comparison.size_ratio, name)
    law, free = next((pair for pair in own if pair[0] is head), own[0])
    return (
        f"at {len(own)} of {both} budgets and reference sizes the size ratio of {wording.architecture(name)} by the "
        f"law differs from that of the losses themselves by more than their 95 % intervals: at "
        f"{wording.budget(law.iterations, law.tokens)} and {wording.human(law.reference_n_params)} parameters the law "
        f"gives {wording.times(law.estimate or 0.0)} {wording.between(law.estimate_ci95, 2)} and the losses "
        f"{wording.times(free.ratio or 0.0)} {wording.between(free.ci95, 2)}."
    )


def _conventions(
    curves: Mapping[str, Curve],
    found: Sequence[Compared],
    base: str,
    delta: float | None,
) -> list[Convention]:
    """Count each architecture's headline also without embeddings, and by six FLOPs a parameter and token."""
    out = []
    recounted: dict[str, Curve] | None = None
    for name in curves:
        ratio = headline_of((one.ratio for one in found), name)
        if ratio is None or ratio.estimate is None or ratio.n_params is None:
            continue
        gain = next(one.gain for one in found if one.ratio is ratio)
        recounted = _recounted(curves, delta) if recounted is None else recounted
        if {name, base} <= set(recounted):
            other = _without_embeddings(recounted[name], recounted[base], curves[base], ratio)
            if other is not None:
                changes = _changes(ratio.estimate, ratio.estimate_ci95, other)
                counts = ("n_params", ratio.estimate, NON_EMBEDDING, other)
                out.append(Convention(name, "size_ratio", *counts, changes))
        if gain is not None and gain.gain is not None:
            tokens = ratio.tokens if ratio.iterations is None else curves[name].tokens(ratio.iterations)
            plain = ratio.reference_n_params * ratio.tokens / (ratio.n_params * tokens)
            changes = _changes(gain.gain, gain.ci95, plain)
            counts = ("flops", gain.gain, "6 n_params tokens", plain)
            out.append(Convention(name, "compute_gain", *counts, changes))
    return out


def _changes(value: float, ends: Interval | None, other: float) -> bool:
    """Return True if another count turns fewer into more, or lies outside the interval."""
    return (value > 1) != (other > 1) or (ends is not None and not ends[0] <= other <= ends[1])


def _recounted(curves: Mapping[str, Curve], delta: float | None) -> dict[str, Curve]:
    """Fit the laws again to sizes without embeddings; leave out architectures whose points lack that count."""
    frames = {
        name: one.frame.assign(n_params=one.frame[NON_EMBEDDING])
        for name, one in curves.items()
        if one.frame[NON_EMBEDDING].notna().all()
    }
    law = next(iter(curves.values())).law
    if law.shared and len(frames) < len(curves):
        return {}
    return {
        fit.architecture: Curve(law, np.array([list(fit.result.params.values())]), frames[fit.architecture])
        for fit in fit_all(frames, law, delta)
    }


def _without_embeddings(arm: Curve, reference: Curve, counted: Curve, row: SizeRatio) -> float | None:
    """Return the headline's size ratio by laws of sizes counted without embeddings; None if they give none.

    `counted` is the reference with embeddings, which says what size without them the headline's size has.
    """
    is_row = counted.frame["n_params"] == row.reference_n_params
    size = float(counted.frame.loc[is_row, NON_EMBEDDING].median())
    loss = reference.loss(size, reference.data(row.iterations, row.tokens))
    found = float(size_at(arm, loss, arm.data(row.iterations, row.tokens))[0])
    return size / found if np.isfinite(found) and found > 1.0 else None
