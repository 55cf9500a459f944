"""A study trained by real processes that a test kills at chosen instants, and mirrored in between."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from harness.record.journal import ProgressReader, read_progress
from harness.record.root import Root
from harness.tracking.store import default_uri
from harness.tracking.tracker import Tracker
from harness.train.meeting import make_meeting
from tests.harness.journals import read_events, rows_of
from tests.harness.trainer import losses, prepared
from tests.waiting import PATIENCE

EVAL_EVERY, CHECKPOINT_EVERY = 2, 3
Moment = Callable[[], bool]
"""Condition that is tried again and again while a worker trains; when it holds, the worker meets a fault."""


def work(run_dirs: Sequence[str], environment: dict[str, str]) -> None:
    """Do in a forked process what `python -m harness.train.worker` does, but never unpickle what another rank sent."""
    from torch.distributed import distributed_c10d

    from harness.train.worker import main

    def refuse(*_: object) -> None:
        raise AssertionError("a rank would have unpickled what another sent")

    distributed_c10d._tensor_to_object = refuse
    os.environ.update(environment)
    sys.exit(main(run_dirs))


def start_worker(
    run_dirs: Sequence[Path], doing: Callable[..., None] = work, **environment: str
) -> BaseProcess:
    """Start a worker, forked from a process that has made its imports."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.harness.preloaded"])
    process = server.Process(target=doing, args=([str(path) for path in run_dirs], environment))
    process.start()
    return process


def train_on_two_ranks(
    run_dirs: Sequence[Path], meeting: Path, doing: Callable[..., None] = work, status: int = 0
) -> None:
    make_meeting(meeting)
    together = {"WORLD_SIZE": "2", "SSMSCALE_MEETING": str(meeting)}
    ranks = [start_worker(run_dirs, doing, RANK=rank, LOCAL_RANK=rank, **together) for rank in ("0", "1")]
    for rank in ranks:
        rank.join(PATIENCE)
    assert [rank.exitcode for rank in ranks] == [status, status]


class Story:
    """One study under one ROOT, from its first attempt to its last."""

    def __init__(self, root: Root, fields: dict[str, Any], **launch: Any) -> None:
        self.root, self.fields, self._reader = root, fields, ProgressReader()
        settings = {"checkpoint_every": CHECKPOINT_EVERY, "eval_every": EVAL_EVERY, "keep_last": 2}
        ((_, self.runs),) = prepared(root, fields, **{**settings, **launch})
        self.run_dirs = [root.run(run.run_id) for run in self.runs]
        self.series = root.series(self.runs[0].series_id)

    @property
    def folders(self) -> list[Path]:
        """Directories that hold a journal."""
        return [self.series, *self.run_dirs]

    def attempt(self, moment: Moment | None = None, deed: Callable[[], None] | None = None) -> int | None:
        """Train in a process of its own; returns its exit status.

        At the moment the process is killed (-9); with a deed, it is suspended until that is done.
        """
        process = start_worker(self.run_dirs)
        assert process.pid is not None
        deadline = time.monotonic() + PATIENCE
        while moment is not None and process.is_alive():
            if moment():
                if deed is None:
                    process.kill()
                else:
                    os.kill(process.pid, signal.SIGSTOP)
                    deed()
                    os.kill(process.pid, signal.SIGCONT)
                moment = None
            assert time.monotonic() < deadline, "waited in vain"
            process.join(0.002)
        process.join(PATIENCE)
        return process.exitcode

    def finish(self) -> list[float]:
        """Train to the end; returns the losses of the Runs."""
        assert self.attempt() == 0, self.log()
        return losses(self.root, self.fields)

    def mirror(self) -> None:
        """Mirror all journals, with a new tracker."""
        Tracker(default_uri(self.root), "tiny", self.root).mirror(
            rows_of(self.root, self.fields), settle=True
        )

    def log(self) -> str:
        """Return the last output of the newest worker."""
        return "".join(path.read_text()[-3000:] for path in self.series.glob("logs/*.log"))

    def warnings(self) -> str:
        """Return the warnings of all journals."""
        return "\n".join(
            event["text"]
            for folder in self.folders
            for event in read_events(folder)
            if event["event"] == "warning"
        )

    def check_mlflow(self) -> None:
        """Assert that MLflow holds every journalled step and evaluation once, and that every run is over."""
        check_mirrored(default_uri(self.root), "tiny", self.folders)

    # -- moments

    def while_saving(self) -> bool:
        """True while a checkpoint is being written: its folder is there and its marker is not."""
        return any(
            not path.with_suffix(".complete").exists()
            for folder in self.folders
            for path in (folder / "checkpoints").glob("step-*")
            if path.is_dir()
        )

    def while_evaluating(self) -> bool:
        """True while the trunk is being evaluated: its step is journalled, its held-out loss is not."""
        told = self._reader.read(self.series)
        return told.step > 0 and told.step % EVAL_EVERY == 0 and told.step not in told.evals

    def at_step(self, step: int) -> Moment:
        """Return the moment at which all journals together hold so many training steps."""
        return lambda: sum(len(self._reader.read(folder).steps) for folder in self.folders) >= step

    def after(self, seconds: float) -> Moment:
        """Return the moment so long after the next attempt has begun its journal."""
        begun: list[float] = []
        before = self._reader.read(self.series).attempt

        def passed() -> bool:
            if not begun and self._reader.read(self.series).attempt > before:
                begun.append(time.monotonic())
            return bool(begun) and time.monotonic() - begun[0] > seconds

        return passed


def check_mirrored(uri: str, study: str, folders: Sequence[Path]) -> None:
    """Assert that MLflow holds every Run and Series once and over, with every journalled step and evaluation once."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    found = [
        run
        for run in client.search_runs([experiment.experiment_id], max_results=1000)
        if run.data.tags["ssmscale.kind"] != "study"
    ]
    held = {run.data.tags["ssmscale.id"]: run for run in found}
    assert set(held) == {folder.name for folder in folders}
    assert len(held) == len(found)
    for folder in folders:
        run, told = held[folder.name], read_progress(folder)
        assert run.info.status == "FINISHED"
        for key in run.data.metrics:
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, key)]
            assert len(steps) == len(set(steps)), (folder, key)
        for key, events in (("train_loss", told.steps), ("valid_loss", told.evals)):
            history = client.get_metric_history(run.info.run_id, key) if events else []
            assert {metric.step: metric.value for metric in history} == {
                step: event["loss"] for step, event in events.items()
            }, (folder, key)


def step_files(story: Story) -> list[Path]:
    """Return the files of the trunk's newest checkpoint, its marker first."""
    from harness.record import checkpoints

    newest = checkpoints.marked(story.series / "checkpoints")[-1]
    return [newest.path.with_suffix(".complete"), *(newest.path / name for name in newest.marker.files)]
