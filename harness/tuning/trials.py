"""One trial: the Runs that stand for its values, the losses their journals give Optuna, and its result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
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
"""Attributes of a trial in Optuna's record, whose own states know neither divergence nor why."""


class TrialOutcome(StrEnum):
    """The outcome of a trial that is over; one that was preempted is not."""

    FINISHED = "finished"
    PRUNED = "pruned"
    """Its losses on the way were not worth going on, and its Runs were cancelled."""
    DIVERGED = "diverged"
    """Some Run of it did, which says that its values are bad."""
    FAILED = "failed"
    """Something else was wrong, which says nothing of its values."""


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial that is over."""

    outcome: TrialOutcome
    loss: float | None = None
    """Mean over the seeds of the Runs' held-out losses, where it finished."""
    reason: str | None = None


@dataclass
class LiveTrial:
    """A trial that is not over."""

    case: SearchCase
    trial: Trial
    values: Values
    resolved: ResolvedStudy
    submission: Submission
    twins: list[Trial] = field(default_factory=list)
    """Trials of the same values: trained once, with one result."""
    handed: int = 0
    """Times it was handed over."""
    journals: ProgressReader = field(default_factory=ProgressReader)
    _reported: int = 0
    """Newest step whose loss Optuna has."""

    @property
    def run_ids(self) -> list[str]:
        """Its Runs, a seed each."""
        return [point.run_id for point in self.resolved.points]

    def report(self) -> bool:
        """Give Optuna the losses evaluated since, averaged over seeds; True if it would prune the trial."""
        for step, loss in sorted(self._losses_on_the_way().items()):
            if step > self._reported:
                # Of a step that an earlier controller reported, Optuna keeps the first value.
                self.trial.report(loss, step)
                self._reported = step
                if self.trial.should_prune():
                    return True
        return False

    def _losses_on_the_way(self) -> dict[int, float]:
        last = min(branch_step(point.run.schedule, point.run.iterations) for point in self.resolved.points)
        root = self.resolved.root
        by_seed = [self.journals.read(root.series(point.series_id)).evals for point in self.resolved.points]
        # A trunk that longer Runs share goes on where this one has left it.
        shared = set.intersection(*(set(evals) for evals in by_seed))
        return {step: _mean([evals[step]["loss"] for evals in by_seed]) for step in shared if step <= last}

    def result(self, rows: Sequence[RunStatus]) -> TrialResult | None:
        """Return its result by its Runs' journals; None while it has none."""
        for row in rows:
            if row.state is RunState.FAILED:
                diverged = has_diverged(self.resolved.root, row.run_id)
                return TrialResult(
                    TrialOutcome.DIVERGED if diverged else TrialOutcome.FAILED, reason=row.reason
                )
        losses = [row.loss for row in rows if row.state is RunState.DONE and row.loss is not None]
        return TrialResult(TrialOutcome.FINISHED, _mean(losses)) if len(losses) == len(rows) else None


def has_diverged(root: Root, run_id: str) -> bool:
    """Return whether a Run failed because its loss left all bounds."""
    return read_progress(root.run(run_id)).kind is Kind.DIVERGED


@dataclass(frozen=True)
class TrialRecord:
    """A trial that is over, as Optuna's storage has it."""

    number: int
    values: Values
    result: TrialResult

    @property
    def outcome(self) -> TrialOutcome:
        """The outcome of its result."""
        return self.result.outcome


def finished(records: Sequence[TrialRecord]) -> list[tuple[TrialRecord, float]]:
    """The trials that finished, each with its loss."""
    return [(one, one.result.loss) for one in records if one.result.loss is not None]


def record_of(frozen: FrozenTrial, values: Values) -> TrialRecord:
    """Read a trial that is over out of Optuna's storage."""
    from optuna.trial import TrialState

    attributes: Mapping[str, Any] = frozen.user_attrs
    by_state = {TrialState.COMPLETE: TrialOutcome.FINISHED, TrialState.PRUNED: TrialOutcome.PRUNED}
    outcome = TrialOutcome(attributes.get(OUTCOME, by_state.get(frozen.state, TrialOutcome.FAILED)))
    loss = frozen.value if outcome is TrialOutcome.FINISHED else None
    return TrialRecord(frozen.number, values, TrialResult(outcome, loss, attributes.get(REASON)))


def _mean(losses: Sequence[float]) -> float:
    return math.fsum(losses) / len(losses)
