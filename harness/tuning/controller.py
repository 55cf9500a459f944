"""The one process that tunes a study: it asks Optuna, has trials trained, reads their journals and tells Optuna.

It may be killed at any moment. The Runs of a trial follow from the values in Optuna's storage, and its result from the
journals; so the next controller tells Optuna of the trials that ended meanwhile and goes on with the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from harness.common.process import identify_process
from harness.plan.plan import make_plan
from harness.record.status import RunState, RunStatus
from harness.submit.cancel import reset_attempts
from harness.submit.submission import Submission
from harness.train.stopping import MOST_ATTEMPTS
from harness.tuning.runner import TrialRunner
from harness.tuning.space import SearchCase, Space, Values
from harness.tuning.storage import OWNER, is_ours, open_search, owner_of, startup_trials
from harness.tuning.trials import (
    OUTCOME,
    REASON,
    LiveTrial,
    TrialOutcome,
    TrialRecord,
    TrialResult,
    has_diverged,
    record_of,
)
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study as Search
    from optuna.trial import FrozenTrial, Trial

MOST_FAILURES = 3
"""Trials of a case that may fail, other than by diverging, before nothing more is tried there."""

Listener = Callable[[SearchCase, TrialRecord], None]


class Controller:
    """Tunes every case of a space, their trials side by side."""

    def __init__(self, space: Space, storage: BaseStorage, runner: TrialRunner, on_told: Listener) -> None:
        self.space, self.tune, self.runner, self.on_told = space, space.tune, runner, on_told
        self.owner = owner_of(space.root.study(space.study.name) / "tune")
        every = space.study.tracking.eval_every
        self.searches: dict[SearchCase, Search] = {
            case: open_search(storage, case, self.tune, space.iterations, every) for case in space.cases
        }
        self.process = identify_process()
        self.live: list[LiveTrial] = []
        self._failed: dict[SearchCase, list[TrialRecord]] = {case: [] for case in self.searches}
        """Trials that failed under this controller."""

    def run(self, on_look: Callable[[], None] = lambda: None) -> None:
        """Bring every case to its number of trials. Raises DiskFull where no room is left to go on."""
        for case, search in self.searches.items():
            self._adopt(case, search)
        room = self.tune.parallel or self.runner.room(len(self.tune.seeds))
        while True:
            while len(self.live) < room and (lacking := self._next_case()) is not None:
                self._ask(lacking)
            if not self.live:
                return
            self._look()
            on_look()
            time.sleep(self.runner.pause)

    def told(self, case: SearchCase) -> list[TrialRecord]:
        """The trials of a case that are over, oldest first."""
        return [
            record_of(frozen, self.space.values(frozen.params))
            for frozen in self.searches[case].get_trials(deepcopy=False)
            if frozen.state.is_finished() and self._is_whole(frozen.params)
        ]

    def failed(self) -> list[tuple[SearchCase, TrialRecord]]:
        """The trials that failed under this controller and whose values no other has brought to an end."""
        ended = {
            case: [one.values for one in self.told(case) if one.outcome is not TrialOutcome.FAILED]
            for case in self.searches
        }
        return [
            (case, one)
            for case, all_ in self._failed.items()
            for one in all_
            if one.values not in ended[case]
        ]

    def _next_case(self) -> SearchCase | None:
        """The case with the fewest trials of those that lack some, so that all know about as much of themselves."""
        lacking = {
            case: count
            for case in self.searches
            if (count := self._count(case)) < self.tune.trials and len(self._failed[case]) < MOST_FAILURES
        }
        return min(lacking, key=lambda case: lacking[case], default=None)

    def _count(self, case: SearchCase) -> int:
        from optuna.trial import TrialState

        counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return len(self.searches[case].get_trials(deepcopy=False, states=counted))

    def _ask(self, case: SearchCase) -> None:
        from optuna.trial import TrialState

        search = self.searches[case]
        trials = search.get_trials(deepcopy=False)
        startup = startup_trials(self.tune)
        if len(trials) < startup and all(trial.state is not TrialState.WAITING for trial in trials):
            search.enqueue_trial(self.space.design(startup, case.name)[len(trials)])
        trial = search.ask(fixed_distributions=self.space.distributions())
        trial.set_user_attr(OWNER, self.owner)
        self._begin(case, trial, self.space.values(trial.params))

    def _adopt(self, case: SearchCase, search: Search) -> None:
        """Take over what an earlier controller of this ROOT left running."""
        from optuna.trial import Trial, TrialState

        for frozen in search.get_trials(states=(TrialState.RUNNING,)):
            if not self._is_ours(frozen):
                continue
            if not self._is_whole(frozen.params):  # it was killed while it asked
                search.tell(frozen.number, state=TrialState.FAIL)
                continue
            self._begin(case, Trial(search, frozen._trial_id), self.space.values(frozen.params))

    def _is_ours(self, frozen: FrozenTrial) -> bool:
        return is_ours(frozen, self.owner, shared=self.tune.storage is not None)

    def elsewhere(self) -> int:
        """Number of trials that run under another ROOT on the same storage."""
        from optuna.trial import TrialState

        running = (TrialState.RUNNING,)
        return sum(
            not self._is_ours(frozen)
            for search in self.searches.values()
            for frozen in search.get_trials(deepcopy=False, states=running)
        )

    def _is_whole(self, params: object) -> bool:
        return isinstance(params, dict) and set(params) == set(self.space.dimensions)

    def _begin(self, case: SearchCase, trial: Trial, values: Values) -> None:
        """Have a trial trained, unless one of the same values has a result already."""
        for told in self.told(case):
            if told.values == values and told.outcome is not TrialOutcome.FAILED:
                self._tell(case, trial, told.values, told.result)
                return
        try:
            resolved = self.space.trial(case.architecture, case.size, values)
        except InputError as error:  # each value alone made a run
            self._tell(case, trial, values, TrialResult(TrialOutcome.FAILED, reason=str(error)))
            return
        for live in self.live:
            # Equal values, or ones that differ in what this architecture has no use for.
            if live.resolved.points == resolved.points:
                live.twins.append(trial)
                return
        plan = make_plan(resolved.study, resolved.points, resolved.corpus, resolved.root, self.runner.cluster)
        submission = Submission(resolved, plan, self.runner.backend, sidecars=False)
        rows = [run.status for run in plan.runs]
        again = [
            row
            for row in rows
            if row.state is RunState.CANCELLED
            or (row.state is RunState.FAILED and not has_diverged(resolved.root, row.run_id))
        ]
        if again:  # pruned by a search that judged otherwise, or failed for a reason that may be gone
            reset_attempts(resolved.root, resolved.study.name, again)
        self.live.append(LiveTrial(case, trial, values, resolved, submission))

    def _look(self) -> None:
        points = {point.run_id: point for live in self.live for point in live.resolved.points}
        rows = {row.run_id: row for row in self.runner.look(list(points.values()))}
        for live in list(self.live):
            self._follow(live, [rows[run_id] for run_id in live.run_ids])

    def _follow(self, live: LiveTrial, rows: Sequence[RunStatus]) -> None:
        result = live.result(rows)
        if result is None and live.report():
            result = TrialResult(TrialOutcome.PRUNED)
        if result is None:
            result = self._hand_over(live, rows)
        if result is None:
            return
        left = [row.run_id for row in rows if row.state not in {RunState.DONE, RunState.FAILED}]
        if left:  # before Optuna is told: no one looks at the jobs of a trial that is over
            live.submission.control.append("cancelled", runs=left, reason=str(result.outcome))
            self.runner.cancel(live.resolved, rows)
        for trial in (live.trial, *live.twins):
            self._tell(live.case, trial, self.space.values(trial.params), result)
        self.live.remove(live)

    def _hand_over(self, live: LiveTrial, rows: Sequence[RunStatus]) -> TrialResult | None:
        """Hand over the Runs that no process trains; the trial's result where that was done too often."""
        missing = [row for row in rows if row.state in {RunState.NEW, RunState.INTERRUPTED}]
        if not missing:
            return None
        if live.handed >= MOST_ATTEMPTS * len(rows):
            why = f": {missing[0].reason}" if missing[0].reason else ""
            reason = f"run {missing[0].run_id} was handed over {MOST_ATTEMPTS} times and did not end{why}"
            return TrialResult(TrialOutcome.FAILED, reason=reason)
        live.handed += len(missing) if self.runner.train(live.submission, missing) else 0
        return None

    def _tell(self, case: SearchCase, trial: Trial, values: Values, result: TrialResult) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr(OUTCOME, str(result.outcome))
        if result.reason is not None:
            trial.set_user_attr(REASON, result.reason)
        # To Optuna a trial that diverged is one that was pruned: bad values, and no loss to learn a scale from.
        states = {TrialOutcome.FINISHED: TrialState.COMPLETE, TrialOutcome.FAILED: TrialState.FAIL}
        self.searches[case].tell(trial, result.loss, states.get(result.outcome, TrialState.PRUNED))
        told = TrialRecord(trial.number, values, result)
        if result.outcome is TrialOutcome.FAILED:
            self._failed[case].append(told)
        self.on_told(case, told)

    def trials(self) -> Iterator[tuple[SearchCase, int, LiveTrial | TrialRecord]]:
        """Every trial of every case with its number, those that are over first."""
        for case in self.searches:
            for told in self.told(case):
                yield case, told.number, told
        for live in self.live:
            yield live.case, live.trial.number, live
