"""The controller of a study's searches: it asks Optuna for trials, has them trained, and tells Optuna their results.

It may be killed at any moment. The Runs of a trial follow from its values in Optuna's storage, and its result from the
journals, so the next controller tells Optuna the results of trials that ended meanwhile, and continues the others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from harness.common.process import identify_process
from harness.plan.plan import make_plan
from harness.record.registry import record_trial
from harness.record.status import RunState, RunStatus
from harness.submit.cancel import reset_attempts
from harness.submit.submission import Submission
from harness.train.stopping import MOST_ATTEMPTS
from harness.tuning.runner import TrialRunner
from harness.tuning.space import SearchCase, Space, Values
from harness.tuning.storage import OWNER, is_ours, open_search, owners_of, startup_trials
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
"""Failed trials of a case, not counting those that diverged, after which it gets no more trials."""

FEW = 4
"""Trials of a case at once on a scheduler, where `parallel` is null, once the sampler chooses their values."""

Listener = Callable[[SearchCase, TrialRecord], None]


class Controller:
    """Tunes every case of a space, their trials side by side."""

    def __init__(self, space: Space, storage: BaseStorage, runner: TrialRunner, on_record: Listener) -> None:
        self.space, self.tune, self.runner, self.on_record = space, space.tune, runner, on_record
        self.owners = owners_of(space.root, space.root.study(space.study.name) / "tune")
        every = space.study.tracking.eval_every
        self.searches: dict[SearchCase, Search] = {
            case: open_search(storage, case, self.tune, space.iterations, every) for case in space.cases
        }
        self.process = identify_process()
        self.live: list[LiveTrial] = []
        self._failed: dict[SearchCase, list[TrialRecord]] = {case: [] for case in self.searches}
        """Trials that failed under this controller."""

    def run(self, on_look: Callable[[], None] = lambda: None) -> None:
        """Bring every case to its number of trials. Raises DiskFull where the disk has no space left."""
        for case, search in self.searches.items():
            self._adopt(case, search)
        capacity = self.tune.parallel or self.runner.capacity(len(self.tune.seeds))
        while True:
            while len(self.live) < capacity and (lacking := self._next_case()) is not None:
                self._ask(lacking)
            if not self.live:
                return
            points = {point.run_id: point for live in self.live for point in live.resolved.points}
            rows = {row.run_id: row for row in self.runner.look(list(points.values()))}
            for live in list(self.live):
                self._follow(live, [rows[run_id] for run_id in live.run_ids])
            on_look()
            time.sleep(self.runner.pause)

    def records(self, case: SearchCase) -> list[TrialRecord]:
        """Return the ended trials of a case, oldest first."""
        return [
            record_of(frozen, self.space.values(frozen.params))
            for frozen in self.searches[case].get_trials(deepcopy=False)
            if frozen.state.is_finished() and self._is_whole(frozen.params)
        ]

    def failed(self) -> list[tuple[SearchCase, TrialRecord]]:
        """Return the trials that failed under this controller and whose values no other trial brought to a result."""
        found = []
        for case, failed in self._failed.items():
            ended = [one.values for one in self.records(case) if not one.has_failed]
            found += [(case, one) for one in failed if one.values not in ended]
        return found

    def _next_case(self) -> SearchCase | None:
        """Return the case with the fewest trials of those that need more, or None."""
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        counts = {
            case: len(search.get_trials(deepcopy=False, states=states))
            for case, search in self.searches.items()
            if len(self._failed[case]) < MOST_FAILURES and self._may_ask(case)
        }
        fewest = min(counts, key=lambda case: counts[case], default=None)
        return None if fewest is None or counts[fewest] >= self.tune.trials else fewest

    def _may_ask(self, case: SearchCase) -> bool:
        """Return False if a case has as many trials at once as a search may have that learns from each.

        The first ones fill the space evenly and need no results; the later ones start a few at a time.
        """
        if self.tune.parallel is not None or not self.runner.is_crowded or not startup_trials(self.tune):
            return True
        asked = len(self.searches[case].get_trials(deepcopy=False))
        live = sum(1 + len(one.twins) for one in self.live if one.case == case)
        return asked < startup_trials(self.tune) or live < FEW

    def _ask(self, case: SearchCase) -> None:
        from optuna.trial import TrialState

        search = self.searches[case]
        trials = search.get_trials(deepcopy=False)
        startup = startup_trials(self.tune)
        if len(trials) < startup and all(trial.state is not TrialState.WAITING for trial in trials):
            search.enqueue_trial(self.space.design(startup, case.name)[len(trials)])
        trial = search.ask(fixed_distributions=self.space.distributions())
        trial.set_user_attr(OWNER, self.owners[0])
        self._begin(case, trial, self.space.values(trial.params))

    def _adopt(self, case: SearchCase, search: Search) -> None:
        """Take over the trials that an earlier controller of this ROOT left running."""
        from optuna.trial import Trial, TrialState

        for frozen in search.get_trials(states=(TrialState.RUNNING,)):
            if not self._is_ours(frozen):
                continue
            if not self._is_whole(frozen.params):  # the controller was killed while Optuna suggested values
                search.tell(frozen.number, state=TrialState.FAIL)
                continue
            self._begin(case, Trial(search, frozen._trial_id), self.space.values(frozen.params))

    def _is_ours(self, frozen: FrozenTrial) -> bool:
        return is_ours(frozen, self.owners, shared=self.tune.storage is not None)

    def elsewhere(self) -> Counter[str]:
        """Count the trials that run under other ROOTs on the same storage, by the ROOT's identity."""
        return Counter(frozen.user_attrs.get(OWNER, "") for _, frozen in self._elsewhere())

    def _elsewhere(self) -> Iterator[tuple[Search, FrozenTrial]]:
        from optuna.trial import TrialState

        for search in self.searches.values():
            for frozen in search.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if not self._is_ours(frozen):
                    yield search, frozen

    def release(self, root: str) -> None:
        """Give up the trials that run under a lost ROOT, named by the first digits of its identity.

        Raises InputError if these digits do not name one ROOT with running trials.
        """
        from optuna.trial import Trial

        named = {owner for owner in self.elsewhere() if owner and owner.startswith(root)}
        if len(named) != 1:
            others = ", ".join(sorted(owner[:8] for owner in self.elsewhere() if owner)) or "none"
            raise InputError(
                f"--release-lost {root}: does not name one other ROOT whose trials run; they are {others}"
            )
        lost = [
            (search, frozen) for search, frozen in self._elsewhere() if frozen.user_attrs.get(OWNER) in named
        ]
        for search, frozen in lost:
            result = TrialResult(TrialOutcome.FAILED, reason=f"its ROOT {root} was given up as lost")
            _store(search, Trial(search, frozen._trial_id), result)

    def _is_whole(self, params: object) -> bool:
        return isinstance(params, dict) and set(params) == set(self.space.dimensions)

    def _begin(self, case: SearchCase, trial: Trial, values: Values) -> None:
        """Begin to train a trial, unless a trial of the same values has a result already."""
        for record in self.records(case):
            if record.values == values and not record.has_failed:
                self._tell(case, trial, record.values, record.result)
                return
        try:
            resolved = self.space.trial(case.architecture, case.size, values)
        except InputError as error:  # each value is valid, but not all of them together
            self._tell(case, trial, values, TrialResult(TrialOutcome.FAILED, reason=str(error)))
            return
        for live in self.live:
            # Equal values, or values that differ in a key that this architecture does not use.
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
        if again:  # another search pruned it, or the reason of its failure may be gone
            reset_attempts(resolved.root, resolved.study.name, again)
        record_trial(self.space.root, self.space.study.name, trial.number, resolved.points)
        self.live.append(LiveTrial(case, trial, values, resolved, submission))

    def _follow(self, live: LiveTrial, rows: Sequence[RunStatus]) -> None:
        result = live.result(rows)
        if result is None and live.report():
            result = TrialResult(TrialOutcome.PRUNED)
        if result is None:
            result = self._hand_over(live, rows)
        if result is None:
            return
        left = [row.run_id for row in rows if row.state not in {RunState.DONE, RunState.FAILED}]
        if left:  # before Optuna is told: later controllers ignore the jobs of an ended trial
            live.submission.control.append("cancelled", runs=left, reason=str(result.outcome))
            self.runner.cancel(live.resolved, rows)
        for trial in (live.trial, *live.twins):
            self._tell(live.case, trial, self.space.values(trial.params), result)
        self.live.remove(live)

    def _hand_over(self, live: LiveTrial, rows: Sequence[RunStatus]) -> TrialResult | None:
        """Submit the Runs that no process trains; return a result if they were submitted too often."""
        missing = [row for row in rows if row.state in {RunState.NEW, RunState.INTERRUPTED}]
        if not missing:
            return None
        if live.handed >= MOST_ATTEMPTS * len(rows):
            why = f": {missing[0].reason}" if missing[0].reason else ""
            reason = f"run {missing[0].run_id} was submitted {MOST_ATTEMPTS} times and did not end{why}"
            return TrialResult(TrialOutcome.FAILED, reason=reason)
        if self.runner.train(live.submission, missing):
            live.handed += len(missing)
        return None

    def _tell(self, case: SearchCase, trial: Trial, values: Values, result: TrialResult) -> None:
        _store(self.searches[case], trial, result)
        record = TrialRecord(trial.number, values, result)
        if record.has_failed:
            self._failed[case].append(record)
        self.on_record(case, record)

    def trials(self) -> Iterator[tuple[SearchCase, int, LiveTrial | TrialRecord]]:
        """Yield every trial of every case with its number, ended trials first."""
        for case in self.searches:
            for record in self.records(case):
                yield case, record.number, record
        for live in self.live:
            yield live.case, live.trial.number, live


def _store(search: Search, trial: Trial, result: TrialResult) -> None:
    """Store the result of a trial that has ended."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    # Optuna takes a diverged trial as a pruned one: its values are bad, and it has no loss.
    states = {TrialOutcome.FINISHED: TrialState.COMPLETE, TrialOutcome.FAILED: TrialState.FAIL}
    with suppress(UpdateFinishedTrialError):  # another ROOT gave it up, as if this one were lost
        trial.set_user_attr(OUTCOME, str(result.outcome))
        if result.reason is not None:
            trial.set_user_attr(REASON, result.reason)
        search.tell(trial, result.loss, states.get(result.outcome, TrialState.PRUNED))
