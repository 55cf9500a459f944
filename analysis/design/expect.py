"""Before training: can this grid identify the law, and how wide will the intervals of its report be?

Simulated studies give the answer. It holds for the real study as far as the prior is right.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from analysis import text as wording
from analysis.design.prior import Prior
from analysis.design.simulate import USUAL, Draws, Simulated, holds, middle, simulate
from analysis.findings.comparison import fit_all
from analysis.findings.curve import reference_of
from analysis.findings.note import Frozen, Note
from analysis.findings.notes import design_notes, resample_notes
from analysis.fitting.bootstrap import resample
from analysis.laws.law import Interval, Law
from analysis.points.table import CheckedPoints, too_few

OFTEN = 0.05
FEW_DRAWS = 100
ASSUMED = (
    "no law is known yet, so the demo's shape was moved to this grid, with the size ratio of 4 that arXiv 2601.14786 "
    "reports for state-space models; give a former fit with --prior FIT.json, or design.prior in the study."
)
TOO_LOW = 0.9  # coverage that is two standard errors below 95 % in a hundred studies


class ExpectedParameter(Frozen):
    """A parameter of the prior, the expected interval of its fit, and the share of intervals that contain the truth."""

    truth: float
    ci95: Interval
    coverage: float


class ExpectedRatio(Frozen):
    """The size ratio that a report of this grid is expected to have at the headline of the prior's laws.

    `ci95` has the median ends over simulated studies, null if most of those have none. `identified`, `extrapolated` and
    `not_identified` are shares of the studies; `coverage` is the share of their intervals that contain the truth.
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
        """Width of the interval of the ratio's logarithm; infinite if there is none."""
        return float("inf") if self.ci95 is None else float(np.log(self.ci95[1] / self.ci95[0]))


class DesignDocument(Frozen):
    """Expected results of a grid; `model_dump(mode="json")` is the `design` of `plan --design --json`."""

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
    grid: CheckedPoints, prior: Prior, reference: str | None = None, draws: Draws = USUAL
) -> DesignDocument:
    """Simulate the grid under the prior and return the expected results of its report.

    A grid that cannot be fitted is not simulated, and a note says why. Raises InputError for a reference that is not in
    the grid and for an architecture that the prior lacks.
    """
    base = reference_of(grid.architectures, reference)
    prior.losses(grid.frame)
    notes = []
    if prior.assumed:
        notes.append(Note("prior_assumed", ASSUMED))
    refused = [reason for name in grid.architectures if (reason := _cannot_be_fitted(grid, name, prior.law))]
    notes += [Note("not_identified", f"{reason}.") for reason in refused]
    found = None
    ratios: list[ExpectedRatio] = []
    if not refused:
        found = simulate(grid, prior, base, draws)
        ratios = ratios_of(found, base)
        notes += _grid_notes(grid, prior)
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
        size_ratio=tuple(ratios),
        notes=tuple(notes),
    )


def ratios_of(found: Simulated, reference: str) -> list[ExpectedRatio]:
    """Summarise each architecture's size ratios over the simulated studies."""
    out = []
    for name, truth in found.truth.items():
        counts = Counter(row.status for row in found.found[name])
        total = len(found.found[name])
        out.append(
            ExpectedRatio(
                architecture=name,
                reference=reference,
                **truth.model_dump(include={"iterations", "tokens", "reference_n_params", "n_params"}),
                truth=truth.estimate,
                ci95=middle(found.ratio[name]),
                coverage=None if truth.estimate is None else holds(found.ratio[name], truth.estimate),
                identified=counts["identified"] / total,
                extrapolated=counts["extrapolated"] / total,
                not_identified=counts["not_identified"] / total,
            )
        )
    return out


def _cannot_be_fitted(grid: CheckedPoints, name: str, law: Law) -> str:
    """Return why no law can be fitted to an architecture of the grid, without row numbers, or an empty string."""
    frame = grid.of(name)
    if not too_few(frame, law):
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


def _grid_notes(grid: CheckedPoints, prior: Prior) -> list[Note]:
    """Return the notes on the grid that its noiseless losses give, each once with its architectures."""
    true = replace(grid, frame=grid.frame.assign(loss=prior.losses(grid.frame)))
    fits = fit_all(true.frames, prior.law)
    drawn = resample(fits, FEW_DRAWS, 0)
    of: dict[tuple[str, str], list[str]] = {}
    for fit in fits:
        frame = grid.of(fit.architecture)
        for note in (*design_notes(fit, frame), *resample_notes(fit, drawn, frame)):
            of.setdefault((note.code, note.text), []).append(wording.architecture(fit.architecture))
    notes = [Note(code, f"{' and '.join(names)}: {text}") for (code, text), names in of.items()]
    if not drawn.paired:
        text = "the architectures do not have the same size rungs and seeds: resamples pair only in part."
        notes.append(Note("unpaired_resamples", text))
    return notes


def ratio_notes(ratio: ExpectedRatio, found: Simulated) -> list[Note]:
    """Return notes on a size ratio that studies do not identify, or only beyond the grid, or with wrong intervals."""
    arm = wording.architecture(ratio.architecture)
    notes = []
    for code, share in (("not_identified", ratio.not_identified), ("extrapolated", ratio.extrapolated)):
        if share <= OFTEN:
            continue
        truth = found.truth[ratio.architecture]
        reasons = Counter(row.reason for row in found.found[ratio.architecture] if row.status == code)
        usual = truth.reason if truth.status == code else reasons.most_common(1)[0][0]
        text = f"in {share:.0%} of simulated studies the size ratio of {arm} is {code.replace('_', ' ')}: {usual}."
        notes.append(Note(code, text))
    if ratio.coverage is not None and ratio.coverage < TOO_LOW:
        text = (
            f"intervals of the ratio of {arm} contain the truth in {ratio.coverage:.0%} of simulated studies, not "
            "95 %: they depend on few series; another seed of the largest size helps."
        )
        notes.append(Note("undercovered", text))
    return notes
