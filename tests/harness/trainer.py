"""Training in the test's own process, by real engines with real checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.common.validation import validate
from harness.record.journal import Event, Progress, read_progress
from harness.record.registry import resolve
from harness.record.root import Launch, Root, write_launch, write_run, write_series
from harness.study.schema import Study
from harness.train.engine import Engine
from harness.train.stopping import StopFlag
from harness.train.worker import group_by_series, train_series


class StopAfter(StopFlag):
    """A stop flag that raises itself after it was read so many times, as a signal at a known step would."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self._left = asked

    @property
    def reason(self) -> str | None:
        self._left -= 1
        return "SIGTERM" if self._left < 0 else None


def train(root: Root, fields: dict[str, Any], stop: StopFlag | None = None, **launch: Any) -> list[str]:
    """Write the files of a submission and train every Series; returns the outcomes."""
    return [train_series(runs, place, stop or StopFlag()) for place, runs in prepared(root, fields, **launch)]


def prepared(root: Root, fields: dict[str, Any], **launch: Any) -> Any:
    """Write the files of a submission; returns the Runs by Series."""
    study = validate(Study, fields, "test")
    resolved = resolve(study, root, "test")
    folders = []
    for point in resolved.points:
        folders.append(write_run(root, point.run))
        write_series(root, point.run)
        settings = {
            "corpus": study.corpus.path,
            "control": root.study(study.name) / "control.jsonl",
            "dispatcher": "test",
            "micro_batch": study.training.batch,
            "log_every": study.tracking.log_every,
        }
        write_launch(root, point.run.series_id, Launch.model_validate({**settings, **launch}))
    return group_by_series(folders)


def progress_of(root: Root, fields: dict[str, Any]) -> list[Progress]:
    """Return the progress of the study's Runs, in the grid's order."""
    resolved = resolve(validate(Study, fields, "test"), root, "test")
    return [read_progress(root.run(point.run.run_id)) for point in resolved.points]


def losses(root: Root, fields: dict[str, Any]) -> list[float]:
    """Return the held-out losses of the study's Runs; all must have finished."""
    found = progress_of(root, fields)
    assert [progress.state for progress in found] == [Event.FINISHED] * len(found)
    return [progress.result["loss"] for progress in found if progress.result]


def undisturbed(fields: dict[str, Any], **launch: Any) -> list[float]:
    """Return the held-out losses of a study's Runs, trained apart in one go; each study is trained once."""
    key = json.dumps([fields, launch])
    if key not in _KNOWN:
        with TemporaryDirectory() as folder:
            train(Root(Path(folder)), fields, **launch)
            _KNOWN[key] = losses(Root(Path(folder)), fields)
    return _KNOWN[key]


_KNOWN: dict[str, list[float]] = {}


def spoiling(step: int, place: int, original: Any = Engine.step) -> Any:
    """Return an `Engine.step` after whose given call a weight (place 0) or a moment (-1) is not a number.

    Memory that fails does this.
    """
    import torch

    taken = [0]

    def spoil(engine: Engine, *arguments: Any) -> None:
        original(engine, *arguments)
        taken[0] += 1
        if taken[0] == step:
            with torch.no_grad():
                [held for held in engine._state() if held.numel()][place].view(-1)[0] = math.nan

    return spoil


def series_folder(root: Root) -> Path:
    """Return the one Series of a root."""
    (folder,) = (root.path / "series").iterdir()
    return folder


def trunk_steps(root: Root) -> Sequence[int]:
    """Return the steps of the trunk's newest attempt."""
    progress = read_progress(series_folder(root))
    return sorted(step for step, event in progress.steps.items() if event["attempt"] == progress.attempt)
