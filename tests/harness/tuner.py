"""Tuning in the test's own process: real engines train each trial when it is submitted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from harness.common.process import identify_process
from harness.common.validation import validate
from harness.dispatch.base import SubmitTarget
from harness.dispatch.registry import open_backend
from harness.plan.cluster import this_machine
from harness.record.root import Root
from harness.record.status import RunStatus, StatusReader
from harness.study.grid import GridPoint
from harness.study.schema import Study
from harness.submit.submission import Submission
from harness.train.stopping import StopFlag
from harness.train.worker import group_by_series, train_series
from harness.tuning.controller import Controller
from harness.tuning.runner import TrialRunner
from harness.tuning.space import SearchCase, Space
from harness.tuning.storage import open_journal
from harness.tuning.trials import TrialRecord
from tests.harness.trainer import StopAfter
from tests.studies import Fields


class InThisProcess(TrialRunner):
    """A runner whose `train` returns when the trial has been trained."""

    pause = 0.0

    def __init__(self, root: Root, study_name: str, stop_after: int | None = None) -> None:
        self.cluster = this_machine()
        self.backend = open_backend("local", root.study(study_name), SubmitTarget("local"))
        self.reader = StatusReader(root, study_name)
        self.trained: list[str] = []
        """Runs trained here, in order."""
        self.process = identify_process()
        self.losing = 0
        """Number of the next trials that are lost, as if their node had failed."""
        self.stop_after = stop_after
        """Number of times that training polls for a stop before it gets one; None lets it end."""

    def capacity(self, series: int) -> int:
        return 1

    def train(self, submission: Submission, missing: Sequence[RunStatus]) -> bool:
        for handle in submission.hand_over(missing).handles:
            task = handle.task
            if self.losing:
                self.losing -= 1
                task.give_up(task.run_dirs, "its node was lost")
                continue
            for root, runs in group_by_series(task.run_dirs):
                train_series(
                    runs, root, StopFlag() if self.stop_after is None else StopAfter(self.stop_after)
                )
                self.trained += [run.run_id for run in runs]
        return True

    def cancel(self, *_: object) -> None:
        """Do nothing: no trial trains meanwhile."""

    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        return self.reader.read(points, submitter=self.process)


def with_rate(fields: Fields, rate: float | str, iterations: int | None = None, seed: int = 0) -> Fields:
    """Return the study of one seed with this learning rate, as a user would write it."""
    changed = copy.deepcopy(fields)
    changed["training"]["optimiser"]["lr"] = rate
    changed["grid"]["seeds"] = [seed]
    if iterations is not None:
        changed["grid"]["iterations"] = [iterations]
    return changed


def space_of(root: Root, fields: Fields) -> Space:
    """Return the space of a study's `tune:`."""
    return Space(validate(Study, fields, "test"), root, "test")


def tuned_here(
    root: Root,
    fields: Fields,
    on_record: Callable[[SearchCase, TrialRecord], None] = lambda case, record: None,
    storage: Any = None,
    losing: int = 0,
) -> tuple[Controller, InThisProcess]:
    """Tune a study in this process; return its controller and its runner."""
    space = space_of(root, fields)
    place = InThisProcess(root, f"{space.study.name}/tune")
    place.losing = losing
    folder = root.study(space.study.name) / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    controller = Controller(space, storage or open_journal(folder), place, on_record)
    controller.run()
    return controller, place
