"""One call of `ssmscale tune`: in control of the searches, trials mirrored on the way, what was learnt written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.common.console import stoppable
from harness.common.disk import naming_a_full_disk, write_atomically
from harness.common.format import counted
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
    """What a study's tuning has come to."""

    space: Space
    told: Mapping[SearchCase, Sequence[TrialRecord]]
    steps: Mapping[SearchCase, int]
    """Steps trained for the trials of each case, each Run counted once."""
    tuned: Tuned | None
    notes: Sequence[Note]
    failed: Sequence[tuple[SearchCase, TrialRecord]]
    """Trials that failed this time other than by diverging, and did not succeed when they were tried again."""
    is_kept: bool
    """Whether tuned.json holds what was learnt."""


def tune_study(space: Space, runner: Callable[[], TrialRunner], on_told: Listener) -> Tuning:
    """Search what is left to search, and fit and keep what was learnt.

    Raises InputError where another process tunes the study, Stopped after Ctrl-C or SIGTERM, and DiskFull.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    uri = space.tune.storage
    database = open_database(uri, space.where) if uri else None  # before anything is written
    folder = space.root.study(space.study.name) / "tune"
    with in_control(folder, f"study {space.study.name}"):
        place = runner()
        controller = Controller(space, database or open_journal(folder), place, on_told)
        trials = _Trials(space, controller)
        mirror = MirrorThread(
            tracking_uri(space.study, space.root), trials.name, space.root, tags_of=trials.tags_of
        )
        with stoppable() as poll_stop:
            mirror.start()

            def on_look() -> None:
                poll_stop()
                trials.show(mirror)

            with (
                closing_in_order(place.close, lambda: mirror.finish(trials.rows())),
                naming_a_full_disk(folder / JOURNAL),
            ):
                controller.run(on_look)
            rows = trials.rows()
            mirror.finish(rows)
        told = {case: controller.told(case) for case in space.cases}
        tuned, notes = learn(space, told)
        if elsewhere := controller.elsewhere():
            text = f"{counted(elsewhere, 'trial')} asked for under another ROOT run there, and count as asked for here"
            notes.append(Note("trials_elsewhere", text))
        is_kept = keep(space, tuned, notes)
    return Tuning(space, told, trials.steps(rows), tuned, notes, controller.failed(), is_kept)


def keep(space: Space, tuned: Tuned | None, notes: list[Note]) -> bool:
    """Write tuned.json and say whether it holds what was learnt.

    One that the study was submitted with stays, with a note: its Runs would get other identities.
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
    """The Runs of all trials as a mirror wants them: rows, and tags that say which trial each belongs to."""

    def __init__(self, space: Space, controller: Controller) -> None:
        self.space, self.controller = space, controller
        self.name = trials_name(space.study.name)
        self._reader = StatusReader(space.root, self.name)
        self._points: dict[tuple[SearchCase, int], tuple[GridPoint, ...]] = {}
        self._tags: dict[str, dict[str, str]] = {}
        self._cases: dict[str, SearchCase] = {}
        self._shown = 0.0

    def rows(self) -> list[RunStatus]:
        """Where the Runs of every trial stand, each Run once."""
        for case, number, one in self.controller.trials():
            if (case, number) in self._points:
                continue
            points_of = self._points[case, number] = self._points_of(case, one)
            for point in points_of:
                tags = {"tune.study": self.space.study.name, "tune.trial": str(number)}
                self._tags.setdefault(point.run_id, tags)
                self._cases.setdefault(point.run_id, case)
        points = {point.run_id: point for points in self._points.values() for point in points}
        return self._reader.read(points.values(), submitter=self.controller.process)

    def _points_of(self, case: SearchCase, one: LiveTrial | TrialRecord) -> tuple[GridPoint, ...]:
        if isinstance(one, LiveTrial):
            return one.resolved.points
        try:
            return self.space.trial(case.architecture, case.size, one.values).points
        except InputError:  # values that make no run
            return ()

    def show(self, mirror: MirrorThread) -> None:
        """Tell the mirror now and then."""
        if time.monotonic() - self._shown > MIRROR_SECONDS:
            self._shown = time.monotonic()
            mirror.show(self.rows())

    def tags_of(self, row: RunStatus) -> dict[str, str]:
        """Which trial a Run belongs to, and what became of that."""
        ended = {
            RunState.DONE: TrialOutcome.FINISHED,
            RunState.CANCELLED: TrialOutcome.PRUNED,  # nobody else cancels a trial's Run
            RunState.FAILED: TrialOutcome.FAILED,
        }
        state = ended.get(row.state, "running")
        if state is TrialOutcome.FAILED and has_diverged(self.space.root, row.run_id):
            state = TrialOutcome.DIVERGED
        return self._tags.get(row.run_id, {}) | {"tune.state": str(state)}

    def steps(self, rows: Sequence[RunStatus]) -> dict[SearchCase, int]:
        """Steps trained for each case."""
        steps = dict.fromkeys(self.space.cases, 0)
        for row in rows:
            steps[self._cases[row.run_id]] += row.iterations_done
        return steps
