"""One trial: the Runs with its values, the losses their journals give Optuna, and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import TYPE_CHECKING, Any

from harness.record.journal import ProgressReader, read_progress
from harness.record.kinds import Kind
from harness.record.registry import ResolvedStudy
from harness.record.root import Root
from harness.record.status import RunState, RunStatus
from harness.study.run import branch_step
from harness.submit.submission import Submission
from harness.tuning.space import SearchCase, Values

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

OUTCOME, REASON = "ssmscale.outcome", "ssmscale.reason"
"""Attributes of a trial in Optuna's storage; Optuna's own states have neither divergence nor reasons."""


class TrialOutcome(StrEnum):
    """The outcome of an ended trial; a preempted trial has not ended."""

    FINISHED = "finished"
    PRUNED = "pruned"
    """Optuna gave it up for its losses on the way, and its Runs were cancelled."""
    DIVERGED = "diverged"
    """A Run of it diverged, so its values are bad."""
    FAILED = "failed"
    """A Run of it failed for a reason that has nothing to do with its values."""


@dataclass(frozen=True)
class TrialResult:
    """The result of an ended trial."""

    outcome: TrialOutcome
    loss: float | None = None
    """Mean over the seeds of the Runs' held-out losses, if it finished."""
    reason: str | None = None


@dataclass
class LiveTrial:
    """A trial that has not ended."""

    case: SearchCase
    trial: Trial
    values: Values
    resolved: ResolvedStudy
    submission: Submission
    twins: list[Trial] = field(default_factory=list)
    """Trials of the same values: trained once, with one result."""
    handed: int = 0
    """Number of times a Run of it was submitted."""
    journals: ProgressReader = field(default_factory=ProgressReader)
    _reported: int = 0
    """Newest step whose loss Optuna has."""

    @property
    def run_ids(self) -> list[str]:
        """Ids of its Runs, one a seed."""
        return [point.run_id for point in self.resolved.points]

    def report(self) -> bool:
        """Report new losses, averaged over seeds, to Optuna; True if Optuna prunes the trial."""
        from optuna.exceptions import UpdateFinishedTrialError

        for step, loss in sorted(self._losses_on_the_way().items()):
            if step > self._reported:
                # Of a step that an earlier controller reported, Optuna keeps the first value.
                with suppress(UpdateFinishedTrialError):  # another ROOT gave it up, as if this one were lost
                    self.trial.report(loss, step)
                self._reported = step
                if self.trial.should_prune():
                    return True
        return False

    def _losses_on_the_way(self) -> dict[int, float]:
        last = min(branch_step(point.run.schedule, point.run.iterations) for point in self.resolved.points)
        root = self.resolved.root
        by_seed = [self.journals.read(root.series(point.series_id)).evals for point in self.resolved.points]
        # Longer Runs continue a trunk they share beyond this Run's branch step.
        shared = set.intersection(*(set(evals) for evals in by_seed))
        return {step: fmean([evals[step]["loss"] for evals in by_seed]) for step in shared if step <= last}

    def result(self, rows: Sequence[RunStatus]) -> TrialResult | None:
        """Return its result by its Runs' states; None while it has none."""
        for row in rows:
            if row.state is RunState.FAILED:
                diverged = has_diverged(self.resolved.root, row.run_id)
                outcome = TrialOutcome.DIVERGED if diverged else TrialOutcome.FAILED
                return TrialResult(outcome, reason=row.reason)
            if row.state is RunState.CANCELLED:
                return TrialResult(TrialOutcome.FAILED, reason=f"run {row.run_id} was cancelled")
        losses = [row.loss for row in rows if row.state is RunState.DONE and row.loss is not None]
        return TrialResult(TrialOutcome.FINISHED, fmean(losses)) if len(losses) == len(rows) else None


def has_diverged(root: Root, run_id: str) -> bool:
    """True if a Run failed because its loss diverged."""
    return read_progress(root.run(run_id)).kind is Kind.DIVERGED


@dataclass(frozen=True)
class TrialRecord:
    """An ended trial in Optuna's storage."""

    number: int
    values: Values
    result: TrialResult

    @property
    def has_failed(self) -> bool:
        """True if it failed for a reason other than its values."""
        return self.result.outcome is TrialOutcome.FAILED


def finished(records: Sequence[TrialRecord]) -> list[tuple[TrialRecord, float]]:
    """Return the trials that finished, each with its loss."""
    return [(one, one.result.loss) for one in records if one.result.loss is not None]


def record_of(frozen: FrozenTrial, values: Values) -> TrialRecord:
    """Read an ended trial from Optuna's storage."""
    from optuna.trial import TrialState

    attributes: Mapping[str, Any] = frozen.user_attrs
    by_state = {TrialState.COMPLETE: TrialOutcome.FINISHED, TrialState.PRUNED: TrialOutcome.PRUNED}
    outcome = TrialOutcome(attributes.get(OUTCOME, by_state.get(frozen.state, TrialOutcome.FAILED)))
    loss = frozen.value if outcome is TrialOutcome.FINISHED else None
    return TrialRecord(frozen.number, values, TrialResult(outcome, loss, attributes.get(REASON)))
