"""Before training: can this grid identify the law, and how wide will the intervals of its report be.

The answer is that of simulated studies: what the analysis says of them is what it will say of the real one, as far as
the prior is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from analysis import text as wording
from analysis.design.prior import Prior
from analysis.design.simulate import USUAL, Draws, Progress, Simulated, holds, middle, simulate
from analysis.errors import InputError
from analysis.findings.comparison import fit_all
from analysis.findings.curve import default_reference
from analysis.findings.note import Frozen, Note
from analysis.findings.notes import design_notes, resample_notes
from analysis.fitting.bootstrap import resample
from analysis.laws.law import Interval, Law
from analysis.points.table import CheckedPoints, too_few

OFTEN = 0.05
FEW_DRAWS = 100
TOO_LOW = 0.9  # of coverage: two standard errors below 95 in a hundred studies


class ExpectedParameter(Frozen):
    """A parameter of the prior, the interval its fit is expected to have, and how often that holds the truth."""

    truth: float
    ci95: Interval
    coverage: float


class ExpectedRatio(Frozen):
    """The size ratio at the largest reference and the longest budget, as the report of this grid would have it.

    `ci95` has the median ends over simulated studies, and is null where most of those have none. The shares are of
    simulated studies, by what they said of the ratio; `coverage` is of their intervals.
    """

    architecture: str
    reference: str
    iterations: float | None
    tokens: float
    reference_n_params: float
    n_params: float | None
    truth: float | None
    ci95: Interval | None
    coverage: float | None
    identified: float
    extrapolated: float
    not_identified: float

    @property
    def width(self) -> float:
        """Of the interval of the ratio's logarithm; infinite where there is none."""
        return float("inf") if self.ci95 is None else float(np.log(self.ci95[1] / self.ci95[0]))


class DesignDocument(Frozen):
    """What is expected of a grid; `model_dump(mode="json")` is the `design` of `plan --design --json`."""

    law: str
    prior: dict[str, dict[str, float]]
    prior_source: str
    noise: dict[str, float]
    studies: int
    resamples: int
    seed: int
    architectures: dict[str, dict[str, ExpectedParameter]]
    size_ratio: tuple[ExpectedRatio, ...]
    notes: tuple[Note, ...]


def expected(
    grid: CheckedPoints,
    prior: Prior,
    reference: str | None = None,
    draws: Draws = USUAL,
    *,
    progress: Progress | None = None,
) -> DesignDocument:
    """Simulate the grid under the prior and say what its report would.

    A grid that cannot be fitted at all is not simulated, and a note says why. Raises InputError for a reference that is
    not in the grid and for an architecture that the prior lacks.
    """
    refuse_reference(reference, grid.architectures)
    prior.losses(grid.frame)
    notes = _prior_notes(prior)
    refused = [reason for name in grid.architectures if (reason := _cannot_be_fitted(grid, name, prior.law))]
    notes += [Note(code="not_identified", text=f"{reason}.") for reason in refused]
    found = None
    if not refused:
        found = simulate(grid, prior, reference, draws, progress=progress)
        notes += _grid_notes(grid, prior, draws.delta)
    ratios: tuple[ExpectedRatio, ...] = ()
    if found is not None:
        ratios = tuple(ratios_of(found, reference or default_reference(list(grid.architectures))))
        notes += [note for ratio in ratios for note in ratio_notes(ratio, found)]
    return DesignDocument(
        law=prior.law.name,
        prior={name: dict(prior.params[name]) for name in grid.architectures},
        prior_source=prior.source,
        noise={"series": prior.noise.series, "run": prior.noise.run},
        studies=0 if found is None else draws.studies,
        resamples=draws.resamples,
        seed=draws.seed,
        architectures={} if found is None else _parameters(found, prior),
        size_ratio=ratios,
        notes=tuple(notes),
    )


def refuse_reference(reference: str | None, architectures: Sequence[str]) -> None:
    """Raise InputError for a reference that is not in the grid."""
    if reference is not None and reference not in architectures:
        raise InputError(
            f"--reference {reference}: no such architecture in the grid; it has {', '.join(architectures)}."
        )


def ratios_of(found: Simulated, reference: str) -> list[ExpectedRatio]:
    """What simulated studies said of each architecture's size ratio."""
    out = []
    for name, truth in found.truth.items():
        said = Counter(row.status for row in found.found[name])
        total = len(found.found[name])
        out.append(
            ExpectedRatio(
                architecture=name,
                reference=reference,
                iterations=truth.iterations,
                tokens=truth.tokens,
                reference_n_params=truth.reference_n_params,
                n_params=truth.n_params,
                truth=truth.estimate,
                ci95=middle(found.ratio[name]),
                coverage=None if truth.estimate is None else holds(found.ratio[name], truth.estimate),
                identified=said["identified"] / total,
                extrapolated=said["extrapolated"] / total,
                not_identified=said["not_identified"] / total,
            )
        )
    return out


def _cannot_be_fitted(grid: CheckedPoints, name: str, law: Law) -> str:
    """Why no law can be fitted to an architecture of the grid, in words that name no rows, or nothing."""
    frame = grid.of(name)
    reason = too_few(frame, law)
    if not reason:
        return ""
    sizes = frame["n_params"].nunique()
    has = f"{wording.architecture(name)} has {'1 size' if sizes == 1 else f'{len(frame)} runs'}"
    return f"{has}, and law {law.name} needs 3 sizes and {len(law.names)} runs or more"


def _parameters(found: Simulated, prior: Prior) -> dict[str, dict[str, ExpectedParameter]]:
    out = {}
    for name, ends in found.params.items():
        truths = prior.row(name)[0]
        out[name] = {
            parameter: ExpectedParameter(
                truth=float(truths[j]),
                ci95=(float(np.median(ends[:, j, 0])), float(np.median(ends[:, j, 1]))),
                coverage=float(((ends[:, j, 0] <= truths[j]) & (truths[j] <= ends[:, j, 1])).mean()),
            )
            for j, parameter in enumerate(prior.law.names)
        }
    return out


def _prior_notes(prior: Prior) -> list[Note]:
    if not prior.assumed:
        return []
    text = (
        "no law is known yet, so the demo's shape was moved to this grid, with state-space models four times smaller "
        "for the same loss as arXiv 2601.14786 has it; give a former fit with --prior FIT.json, or design.prior in the "
        "study."
    )
    return [Note(code="prior_assumed", text=text)]


def _grid_notes(grid: CheckedPoints, prior: Prior, delta: float) -> list[Note]:
    """What diagnostics say of the grid itself, by the law's own losses: each once, with the architectures it is of."""
    true = replace(grid, frame=grid.frame.assign(loss=prior.losses(grid.frame)))
    fits = fit_all(true, prior.law, delta)
    drawn = resample(fits, FEW_DRAWS, 0)
    of: dict[tuple[str, str], list[str]] = {}
    for fit in fits:
        frame = grid.of(fit.architecture)
        for note in (*design_notes(fit, frame), *resample_notes(fit, drawn, frame)):
            of.setdefault((note.code, note.text), []).append(wording.architecture(fit.architecture))
    notes = [Note(code=code, text=f"{' and '.join(names)}: {text}") for (code, text), names in of.items()]
    if not drawn.paired:
        text = (
            "the architectures are not trained at the same size rungs and seeds: resamples pair only in part."
        )
        notes.append(Note(code="unpaired_resamples", text=text))
    return notes


def ratio_notes(ratio: ExpectedRatio, found: Simulated) -> list[Note]:
    """What simulated studies say against a size ratio: not identified, beyond the grid, or beside the truth."""
    arm = wording.architecture(ratio.architecture)
    notes = []
    for code, share in (("not_identified", ratio.not_identified), ("extrapolated", ratio.extrapolated)):
        if share <= OFTEN:
            continue
        truth = found.truth[ratio.architecture]
        reasons = Counter(row.reason for row in found.found[ratio.architecture] if row.status == code)
        usual = truth.reason if truth.status == code else reasons.most_common(1)[0][0]
        text = f"in {share:.0%} of simulated studies the size ratio of {arm} is {code.replace('_', ' ')}: {usual}."
        notes.append(Note(code=code, text=text))
    if ratio.coverage is not None and ratio.coverage < TOO_LOW:
        text = (
            f"intervals of the ratio of {arm} hold the truth in {ratio.coverage:.0%} of simulated studies, not 95 %: "
            "much hangs on few series; another seed of the largest size helps."
        )
        notes.append(Note(code="undercovered", text=text))
    return notes
