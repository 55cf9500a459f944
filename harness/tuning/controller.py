"""The one process that tunes a study: it asks Optuna, has trials trained, reads their journals and tells Optuna.

It may be killed at any moment. What a trial stands for follows from the values in Optuna's record, and what became of
it from the journals; so the next controller tells what finished meanwhile and goes on with what did not.
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
from harness.tuning.space import Cell, Space, Values
from harness.tuning.storage import OWNER, is_ours, open_search, owner_of, startup_trials
from harness.tuning.trials import OUTCOME, REASON, Ending, LiveTrial, Outcome, Told, has_diverged, told_of
from harness.tuning.workplace import Workplace
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study as Search
    from optuna.trial import FrozenTrial, Trial

MOST_FAILURES = 3
"""Trials of a cell that may fail, other than by diverging, before nothing more is tried there."""

Listener = Callable[[Cell, Told], None]


class Controller:
    """Tunes every cell of a space, their trials side by side."""

    def __init__(self, space: Space, storage: BaseStorage, workplace: Workplace, on_told: Listener) -> None:
        self.space, self.tune, self.workplace, self.on_told = space, space.tune, workplace, on_told
        self.owner = owner_of(space.root.study(space.study.name) / "tune")
        every = space.study.tracking.eval_every
        self.searches: dict[Cell, Search] = {
            cell: open_search(storage, cell, self.tune, space.iterations, every) for cell in space.cells
        }
        self.process = identify_process()
        self.live: list[LiveTrial] = []
        self._failed: dict[Cell, list[Told]] = {cell: [] for cell in self.searches}
        """Trials that failed under this controller."""

    def run(self, on_look: Callable[[], None] = lambda: None) -> None:
        """Bring every cell to its number of trials. Raises DiskFull where no room is left to go on."""
        for cell, search in self.searches.items():
            self._adopt(cell, search)
        room = self.tune.parallel or self.workplace.room(len(self.tune.seeds))
        while True:
            while len(self.live) < room and (lacking := self._next_cell()) is not None:
                self._ask(lacking)
            if not self.live:
                return
            self._look()
            on_look()
            time.sleep(self.workplace.pause)

    def told(self, cell: Cell) -> list[Told]:
        """The trials of a cell that are over, oldest first."""
        return [
            told_of(frozen, self.space.values(frozen.params))
            for frozen in self.searches[cell].get_trials(deepcopy=False)
            if frozen.state.is_finished() and self._is_whole(frozen.params)
        ]

    def failed(self) -> list[tuple[Cell, Told]]:
        """The trials that failed under this controller and whose values no other has brought to an end."""
        ended = {
            cell: [one.values for one in self.told(cell) if one.outcome is not Outcome.FAILED]
            for cell in self.searches
        }
        return [
            (cell, one)
            for cell, all_ in self._failed.items()
            for one in all_
            if one.values not in ended[cell]
        ]

    # -- asking

    def _next_cell(self) -> Cell | None:
        """The cell with the fewest trials of those that lack some, so that all know about as much of themselves."""
        lacking = {
            cell: count
            for cell in self.searches
            if (count := self._count(cell)) < self.tune.trials and len(self._failed[cell]) < MOST_FAILURES
        }
        return min(lacking, key=lambda cell: lacking[cell], default=None)

    def _count(self, cell: Cell) -> int:
        from optuna.trial import TrialState

        counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return len(self.searches[cell].get_trials(deepcopy=False, states=counted))

    def _ask(self, cell: Cell) -> None:
        from optuna.trial import TrialState

        search = self.searches[cell]
        trials = search.get_trials(deepcopy=False)
        startup = startup_trials(self.tune)
        if len(trials) < startup and all(trial.state is not TrialState.WAITING for trial in trials):
            search.enqueue_trial(self.space.design(startup, cell.name)[len(trials)])
        trial = search.ask(fixed_distributions=self.space.distributions())
        trial.set_user_attr(OWNER, self.owner)
        self._begin(cell, trial, self.space.values(trial.params))

    def _adopt(self, cell: Cell, search: Search) -> None:
        """Take over what an earlier controller of this ROOT left running."""
        from optuna.trial import Trial, TrialState

        for frozen in search.get_trials(states=(TrialState.RUNNING,)):
            if not self._is_ours(frozen):
                continue
            if not self._is_whole(frozen.params):  # it was killed while it asked
                search.tell(frozen.number, state=TrialState.FAIL)
                continue
            self._begin(cell, Trial(search, frozen._trial_id), self.space.values(frozen.params))

    def _is_ours(self, frozen: FrozenTrial) -> bool:
        return is_ours(frozen, self.owner, shared=self.tune.storage is not None)

    def elsewhere(self) -> int:
        """How many trials run under another ROOT that shares the record."""
        from optuna.trial import TrialState

        running = (TrialState.RUNNING,)
        return sum(
            not self._is_ours(frozen)
            for search in self.searches.values()
            for frozen in search.get_trials(deepcopy=False, states=running)
        )

    def _is_whole(self, params: object) -> bool:
        return isinstance(params, dict) and set(params) == set(self.space.dimensions)

    def _begin(self, cell: Cell, trial: Trial, values: Values) -> None:
        """Have a trial trained, unless one of the same values tells what it comes to."""
        for told in self.told(cell):
            if told.values == values and told.outcome is not Outcome.FAILED:
                self._tell(cell, trial, told.values, told.ending)
                return
        try:
            resolved = self.space.trial(cell.architecture, cell.size, values)
        except InputError as error:  # each value alone made a run
            self._tell(cell, trial, values, Ending(Outcome.FAILED, reason=str(error)))
            return
        for live in self.live:
            # Equal values, or ones that differ in what this architecture has no use for.
            if live.resolved.points == resolved.points:
                live.twins.append(trial)
                return
        plan = make_plan(
            resolved.study, resolved.points, resolved.corpus, resolved.root, self.workplace.cluster
        )
        submission = Submission(resolved, plan, self.workplace.backend, sidecars=False)
        rows = [run.status for run in plan.runs]
        again = [
            row
            for row in rows
            if row.state is RunState.CANCELLED
            or (row.state is RunState.FAILED and not has_diverged(resolved.root, row.run_id))
        ]
        if again:  # pruned by a search that judged otherwise, or failed for a reason that may be gone
            reset_attempts(resolved.root, resolved.study.name, again)
        self.live.append(LiveTrial(cell, trial, values, resolved, submission))

    # -- looking

    def _look(self) -> None:
        points = {point.run_id: point for live in self.live for point in live.resolved.points}
        rows = {row.run_id: row for row in self.workplace.look(list(points.values()))}
        for live in list(self.live):
            self._follow(live, [rows[run_id] for run_id in live.run_ids])

    def _follow(self, live: LiveTrial, rows: Sequence[RunStatus]) -> None:
        ending = live.ending(rows)
        if ending is None and live.report():
            ending = Ending(Outcome.PRUNED)
        if ending is None:
            ending = self._hand_over(live, rows)
        if ending is None:
            return
        left = [row.run_id for row in rows if row.state not in {RunState.DONE, RunState.FAILED}]
        if left:  # before it is told: jobs of a trial that is over are looked at by nobody
            live.submission.control.append("cancelled", runs=left, reason=str(ending.outcome))
            self.workplace.cancel(live.resolved, rows)
        for trial in (live.trial, *live.twins):
            self._tell(live.cell, trial, self.space.values(trial.params), ending)
        self.live.remove(live)

    def _hand_over(self, live: LiveTrial, rows: Sequence[RunStatus]) -> Ending | None:
        """Have trained what nobody trains; the trial's end where that was done too often."""
        missing = [row for row in rows if row.state in {RunState.NEW, RunState.INTERRUPTED}]
        if not missing:
            return None
        if live.handed >= MOST_ATTEMPTS * len(rows):
            why = f": {missing[0].reason}" if missing[0].reason else ""
            reason = f"run {missing[0].run_id} was handed over {MOST_ATTEMPTS} times and did not end{why}"
            return Ending(Outcome.FAILED, reason=reason)
        live.handed += len(missing) if self.workplace.train(live.submission, missing) else 0
        return None

    # -- telling

    def _tell(self, cell: Cell, trial: Trial, values: Values, ending: Ending) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr(OUTCOME, str(ending.outcome))
        if ending.reason is not None:
            trial.set_user_attr(REASON, ending.reason)
        # To Optuna a trial that diverged is one that was pruned: bad values, and no loss to learn a scale from.
        states = {Outcome.FINISHED: TrialState.COMPLETE, Outcome.FAILED: TrialState.FAIL}
        self.searches[cell].tell(trial, ending.loss, states.get(ending.outcome, TrialState.PRUNED))
        told = Told(trial.number, values, ending)
        if ending.outcome is Outcome.FAILED:
            self._failed[cell].append(told)
        self.on_told(cell, told)

    # -- for a mirror

    def trials(self) -> Iterator[tuple[Cell, int, LiveTrial | Told]]:
        """Every trial of every cell with its number, those that are over first."""
        for cell in self.searches:
            for told in self.told(cell):
                yield cell, told.number, told
        for live in self.live:
            yield live.cell, live.trial.number, live
