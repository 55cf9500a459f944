"""One call of `ssmscale tune`: control the searches, mirror their trials, and write the learning rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.common.console import stoppable
from harness.common.disk import naming_a_full_disk, write_atomically
from harness.common.format import counted
from harness.common.streams import outlasting_output
from harness.record.registry import submitted_with, trials_name
from harness.record.status import RunState, RunStatus, StatusReader
from harness.study.grid import GridPoint
from harness.study.tune import Tuned
from harness.submit.foreground import closing_in_order
from harness.tracking.live import MirrorThread
from harness.tracking.store import tracking_uri
from harness.tuning.controller import Controller, Listener
from harness.tuning.runner import TrialRunner
from harness.tuning.space import SearchCase, Space
from harness.tuning.storage import JOURNAL, in_control, open_database, open_journal
from harness.tuning.transfer import Note, learn
from harness.tuning.trials import LiveTrial, TrialOutcome, TrialRecord, has_diverged
from ssmttm.errors import InputError

MIRROR_SECONDS = 3.0


@dataclass(frozen=True)
class Tuning:
    """The state of a study's tuning at the end of a call."""

    space: Space
    records: Mapping[SearchCase, Sequence[TrialRecord]]
    steps: Mapping[SearchCase, int]
    """Steps trained for the trials of each case, each Run counted once."""
    tuned: Tuned | None
    notes: Sequence[Note]
    failed: Sequence[tuple[SearchCase, TrialRecord]]
    """Trials that failed in this call other than by diverging, and have no result from another try."""
    is_kept: bool
    """True if tuned.json holds `tuned`."""


def tune_study(space: Space, runner: Callable[[], TrialRunner], on_record: Listener) -> Tuning:
    """Run the missing trials of every search, fit the learning rates, and write tuned.json.

    Raises InputError where another process tunes the study, Stopped after Ctrl-C or SIGTERM, and DiskFull.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    uri = space.tune.storage
    database = open_database(uri, space.where) if uri else None  # before anything is written
    folder = space.root.study(space.study.name) / "tune"
    with in_control(folder, f"study {space.study.name}"):
        trainer = runner()
        controller = Controller(space, database or open_journal(folder), trainer, on_record)
        trials = _Trials(space, controller)
        address = tracking_uri(space.study, space.root)
        mirror = MirrorThread(address, trials.name, space.root, tags_of=trials.tags_of)
        with outlasting_output(), stoppable() as poll_stop:
            mirror.start()

            def on_look() -> None:
                poll_stop()
                trials.show(mirror)

            with (
                closing_in_order(trainer.close, lambda: mirror.finish(trials.rows())),
                naming_a_full_disk(folder / JOURNAL),
            ):
                controller.run(on_look)
            rows = trials.rows()
            mirror.finish(rows)
        records = {case: controller.records(case) for case in space.cases}
        tuned, notes = learn(space, records)
        if elsewhere := controller.elsewhere():
            text = f"{counted(elsewhere, 'trial')} asked for under another ROOT run there, and count as asked for here"
            notes.append(Note("trials_elsewhere", text))
        is_kept = keep(space, tuned, notes)
    return Tuning(space, records, trials.steps(rows), tuned, notes, controller.failed(), is_kept)


def keep(space: Space, tuned: Tuned | None, notes: list[Note]) -> bool:
    """Write tuned.json; return True if it now holds `tuned`.

    A submitted study keeps its tuned.json, with a note, since other learning rates would change its Runs' identities.
    """
    if tuned is None:
        return False
    folder = space.root.study(space.study.name)
    used = submitted_with(space.root, space.study.name)
    if used not in (None, tuned):
        why = f"{folder / 'study.json'}: was submitted with other learning rates, which stay; tune under another name"
        notes.append(Note("tuned_kept", why))
        return False
    write_atomically(folder / "tuned.json", tuned.model_dump_json(indent=1) + "\n")
    return True


class _Trials:
    """The Runs of all trials for the mirror: rows, and tags with the trial of each Run."""

    def __init__(self, space: Space, controller: Controller) -> None:
        self.space, self.controller = space, controller
        self.name = trials_name(space.study.name)
        self._reader = StatusReader(space.root, self.name)
        self._points: dict[str, GridPoint] = {}
        self._trials: dict[str, tuple[SearchCase, int]] = {}
        """Each Run's case and the number of its first trial."""
        self._known: set[tuple[SearchCase, int]] = set()
        self._shown = 0.0

    def rows(self) -> list[RunStatus]:
        """Return the state of every trial's Runs, each Run once."""
        for case, number, one in self.controller.trials():
            new = () if (case, number) in self._known else self._points_of(case, one)
            self._known.add((case, number))
            for point in new:
                self._points.setdefault(point.run_id, point)
                self._trials.setdefault(point.run_id, (case, number))
        return self._reader.read(self._points.values(), submitter=self.controller.process)

    def _points_of(self, case: SearchCase, one: LiveTrial | TrialRecord) -> tuple[GridPoint, ...]:
        if isinstance(one, LiveTrial):
            return one.resolved.points
        try:
            return self.space.trial(case.architecture, case.size, one.values).points
        except InputError:  # values that are not valid together
            return ()

    def show(self, mirror: MirrorThread) -> None:
        """Send the rows to the mirror every few seconds."""
        if time.monotonic() - self._shown > MIRROR_SECONDS:
            self._shown = time.monotonic()
            mirror.show(self.rows())

    def tags_of(self, row: RunStatus) -> dict[str, str]:
        """Return the tags of a Run: its trial, and the trial's state."""
        ended = {
            RunState.DONE: TrialOutcome.FINISHED,
            RunState.CANCELLED: TrialOutcome.PRUNED,  # only the controller cancels a trial's Run
            RunState.FAILED: TrialOutcome.FAILED,
        }
        state = ended.get(row.state, "running")
        if state is TrialOutcome.FAILED and has_diverged(self.space.root, row.run_id):
            state = TrialOutcome.DIVERGED
        tags = {"tune.study": self.space.study.name, "tune.trial": str(self._trials[row.run_id][1])}
        return tags | {"tune.state": str(state)}

    def steps(self, rows: Sequence[RunStatus]) -> dict[SearchCase, int]:
        """Return the steps trained for each case."""
        steps = dict.fromkeys(self.space.cases, 0)
        for row in rows:
            steps[self._trials[row.run_id][0]] += row.iterations_done
        return steps
