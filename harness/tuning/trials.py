"""One trial: the Runs that stand for its values, what their journals tell Optuna, and how it ended."""

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
from harness.study.schedule import branch_step
from harness.submit.submission import Submission
from harness.tuning.space import Cell, Values

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

OUTCOME, REASON = "ssmscale.outcome", "ssmscale.reason"
"""Attributes of a trial in Optuna's record, whose own states know neither divergence nor why."""


class Outcome(StrEnum):
    """How a trial ended; one that was preempted has not."""

    FINISHED = "finished"
    PRUNED = "pruned"
    """Its losses on the way were not worth going on, and its Runs were cancelled."""
    DIVERGED = "diverged"
    """Some Run of it did, which says that its values are bad."""
    FAILED = "failed"
    """Something else was wrong, which says nothing of its values."""


@dataclass(frozen=True)
class Ending:
    """What is told of a trial that is over."""

    outcome: Outcome
    loss: float | None = None
    """Mean over the seeds of the Runs' held-out losses, where it finished."""
    reason: str | None = None


@dataclass
class LiveTrial:
    """A trial that is not over."""

    cell: Cell
    trial: Trial
    values: Values
    resolved: ResolvedStudy
    submission: Submission
    twins: list[Trial] = field(default_factory=list)
    """Trials of the same values: trained once, told alike."""
    handed: int = 0
    """How often it was handed over."""
    _reported: int = 0
    """Newest step whose loss Optuna has."""
    journals: ProgressReader = field(default_factory=ProgressReader)

    @property
    def run_ids(self) -> list[str]:
        """Its Runs, a seed each."""
        return [point.run_id for point in self.resolved.points]

    def report(self) -> bool:
        """Tell Optuna the losses evaluated since, averaged over seeds; whether it says that they are not worth it."""
        for step, loss in sorted(self._losses_on_the_way().items()):
            if step > self._reported:
                self.trial.report(
                    loss, step
                )  # of a step that an earlier controller told, Optuna keeps the first word
                self._reported = step
                if self.trial.should_prune():
                    return True
        return False

    def _losses_on_the_way(self) -> dict[int, float]:
        last = min(branch_step(point.run.schedule, point.run.iterations) for point in self.resolved.points)
        told = [
            self.journals.read(self.resolved.root.series(point.series_id)).evals
            for point in self.resolved.points
        ]
        # A trunk that longer Runs share goes on where this one has left it.
        shared = set.intersection(*(set(evals) for evals in told))
        return {step: _mean([evals[step]["loss"] for evals in told]) for step in shared if step <= last}

    def ending(self, rows: Sequence[RunStatus]) -> Ending | None:
        """How it ended, by its Runs' journals; None while it has not."""
        for row in rows:
            if row.state is RunState.FAILED:
                diverged = has_diverged(self.resolved.root, row.run_id)
                return Ending(Outcome.DIVERGED if diverged else Outcome.FAILED, reason=row.reason)
        losses = [row.loss for row in rows if row.state is RunState.DONE and row.loss is not None]
        return Ending(Outcome.FINISHED, _mean(losses)) if len(losses) == len(rows) else None


def has_diverged(root: Root, run_id: str) -> bool:
    """Whether a Run that failed did so because its loss left all bounds."""
    return read_progress(root.run(run_id)).kind is Kind.DIVERGED


@dataclass(frozen=True)
class Told:
    """A trial that is over, as the record has it."""

    number: int
    values: Values
    ending: Ending

    @property
    def outcome(self) -> Outcome:
        """How it ended."""
        return self.ending.outcome


def finished(told: Sequence[Told]) -> list[tuple[Told, float]]:
    """The trials that finished, each with its loss."""
    return [(one, one.ending.loss) for one in told if one.ending.loss is not None]


def told_of(frozen: FrozenTrial, values: Values) -> Told:
    """A trial of the record that is over."""
    from optuna.trial import TrialState

    attributes: Mapping[str, Any] = frozen.user_attrs
    by_state = {TrialState.COMPLETE: Outcome.FINISHED, TrialState.PRUNED: Outcome.PRUNED}
    outcome = Outcome(attributes.get(OUTCOME, by_state.get(frozen.state, Outcome.FAILED)))
    loss = frozen.value if outcome is Outcome.FINISHED else None
    return Told(frozen.number, values, Ending(outcome, loss, attributes.get(REASON)))


def _mean(losses: Sequence[float]) -> float:
    return math.fsum(losses) / len(losses)
