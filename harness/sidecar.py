"""A mirror beside a worker, where the submitting process is not there to mirror: started, and never waited for long.

Nothing of it is in the training process but one end of a pipe: no import of MLflow, no thread. It runs with less
priority and in a session of its own, ends when the worker does, and what it has not sent by then `ssmscale sync` does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from harness.rundir import Launch, Root

log = logging.getLogger("ssmscale.worker")

LAST_SECONDS = 5.0
"""How long a finished Series waits for its mirror's last round."""


@contextmanager
def mirrored_beside(launch: Launch, root: Root, series_id: str) -> Iterator[None]:
    """Have the Series mirrored while the block runs, where its launch names a tracker."""
    if launch.tracking is None:
        yield
        return
    process = _start(launch, root, series_id)
    try:
        yield
    finally:
        if process is not None:
            _end(process)


def _start(launch: Launch, root: Root, series_id: str) -> subprocess.Popen[bytes] | None:
    command = [sys.executable, "-m", "harness.mirror", str(launch.control.parent), series_id]
    hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    log_file = root.series(series_id) / "logs" / "mirror.log"
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end cannot come too early, as a signal can
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:  # out of processes or disk: training needs none of this
        log.warning("series %s is not mirrored meanwhile: %s", series_id, error)
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LAST_SECONDS)
