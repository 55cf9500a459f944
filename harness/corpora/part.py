"""The work of one task of a corpus: a part of its tracks, or with Ray Data all of them.

The build itself is ssmttm's (ssmttm.corpus.build). This module hands it the request of a task, and its progress to the
task's journal and heartbeat.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from harness.common.validation import validate
from harness.study.run import Count, Frozen, WholeNumber
from harness.train.part import AtWork
from ssmttm.corpus.build import OpenBuild, build_part, local_workers
from ssmttm.corpus.parts import Share
from ssmttm.corpus.progress import Progress, speed
from ssmttm.corpus.spec import BuildSpec

log = logging.getLogger("ssmscale.corpora")

MOVE_SECONDS = 5.0
"""Least time between two moves that are reported while no track or shard ends."""
SIGNAL_SECONDS = 1.0
"""Time in which a signal reaches all processes of a job."""


class BuildRequest(Frozen):
    """The request of a task: a corpus and its share of the tracks."""

    spec: BuildSpec
    out: Path
    """Folder of the corpus, absolute."""
    device: str = "cpu"
    """Device of a pretrained codec: cpu or cuda."""
    part: WholeNumber = 0
    of: Count = 1
    workers: Count = 1
    """Processes of the task."""
    by_ray_data: bool = False
    """True if the task is a driver of the Ray to which its process is connected."""


def work(request: Mapping[str, JsonValue], at_work: AtWork) -> None:
    """Do a task of a corpus; raises what `build_part` and `AtWork.moved` raise."""
    asked = validate(BuildRequest, dict(request), f"{at_work.folder}: request")
    progress = PartProgress(at_work)
    at_work.moved(0)
    open_workers = local_workers(asked.workers)
    if asked.by_ray_data:
        from harness.corpora.ray_data import ray_workers

        open_workers = ray_workers
    build = OpenBuild(asked.spec, asked.out, asked.device, computes_elsewhere=asked.by_ray_data)
    try:
        build_part(build, Share(asked.part, asked.of), open_workers, progress)
    except RuntimeError:
        # A signal that ends a job reaches its processes one after the other, and some of the build's die by it.
        time.sleep(SIGNAL_SECONDS)
        progress.end()
        raise
    progress.end()


class PartProgress(Progress):
    """Reports the tracks and shards of a build as the steps of a task, and their speed in its log."""

    def __init__(self, at_work: AtWork) -> None:
        self._at_work = at_work
        self._step = 0
        self._moved_at = 0.0
        self._name, self._began, self._audio = "", time.monotonic(), 0.0

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a stage."""
        self._say()
        self._name, self._began, self._audio = name, time.monotonic(), 0.0
        log.info("%s: %d/%d", name, done, total)
        self._move(done)

    def advance(self, seconds: float = 0.0) -> None:
        """Count a track or shard."""
        self._audio += seconds
        self._move(1)

    def pulse(self) -> None:
        """Show that the task is alive."""
        if time.monotonic() - self._moved_at >= MOVE_SECONDS or self._at_work.should_stop():
            self._move(0)

    def end(self) -> None:
        """Have the journal show every step."""
        self._say()
        self._at_work.moved(self._step, self._step)

    def _move(self, steps: int) -> None:
        self._step += steps
        self._moved_at = time.monotonic()
        self._at_work.moved(self._step)

    def _say(self) -> None:
        """Write the speed of the stage that ends."""
        if self._audio:
            log.info("%s: %s", self._name, speed(self._audio, time.monotonic() - self._began))
