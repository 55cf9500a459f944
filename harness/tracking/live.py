"""Mirroring during training: in a thread of the submitting process, or in a sidecar process beside a worker.

    python -m harness.tracking.live STUDY_DIR SERIES_ID    mirror that Series until standard input ends

No training process mirrors itself: importing MLflow would stop its other threads for seconds. Each round reads the new
lines of open journals and sends what MLflow lacks. A tracker that is slow, refuses or is unreachable costs one warning;
it is tried again at growing intervals and then receives everything.

The sidecar is for jobs that a scheduler starts on other machines, so it never opens an SQLite file. Its standard input
is a pipe from the worker, whose end means that the Series is over or the worker is gone. SIGTERM, from a scheduler,
means that the worker is about to end. The worker does not wait long for it: `ssmscale sync` sends what is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.common.address import is_sqlite, redact
from harness.common.format import hint
from harness.common.process import interpreter, log_to_stderr, start_logged
from harness.common.validation import first_line
from harness.record.root import Launch, Root, read_launch
from harness.record.status import RunState, RunStatus, StatusReader
from harness.record.trust import believe, may_receive_logins
from harness.study.grid import GridPoint
from harness.tracking.tracker import Tags, Tracker
from harness.tracking.watch import Watch, in_thread
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.tracking")

EVERY_SECONDS = 3.0
"""Pause between two rounds."""
LONGEST_PAUSE = 60.0
"""Longest time between two attempts at an unreachable tracker."""
STUCK_SECONDS = 120.0
"""Wait at the end of a submission for a tracker that fails again and again."""
LAST_TRIES, LAST_PAUSE = 4, 1.0
"""Repetitions of a failed last round, and the seconds before each."""
ENDING_SECONDS = 5.0
"""Time for a trainer to end after it has closed the sidecar's input."""
PARENT_SECONDS = 120.0
"""Time for a worker to save and end after SIGTERM."""
LAST_SECONDS = 5.0
"""Wait of a finished Series for its sidecar's last round."""


class Rounds:
    """Repeated mirroring of one study; a round never raises."""

    def __init__(
        self,
        uri: str,
        study_name: str,
        root: Root,
        tags_of: Tags = lambda _: {},
        *,
        with_study: bool = True,
    ) -> None:
        self.watch = Watch()
        self._uri, self._arguments = redact(uri), (uri, study_name, root, tags_of, self.watch)
        self._study_name, self._with_study = study_name, with_study
        self.pause = EVERY_SECONDS
        """Seconds before the next round: more after each failure."""
        self.problem: str | None = None
        """Error of the newest round, if any."""
        self.tracker: Tracker | None = None
        self.is_stopped = False
        """Set by another thread to end the present round early."""

    def mirror(self, rows: Sequence[RunStatus], *, settle: bool = False) -> None:
        """Mirror once."""
        try:
            if self.tracker is None:
                self.tracker = Tracker(*self._arguments)
            done = self.tracker.mirror(
                rows, settle=settle, with_study=self._with_study, stopped=lambda: self.is_stopped
            )
            for note in done.notes:
                log.warning("%s", note)
            if self.problem is not None:
                log.info("MLflow answers again and has everything")
            self.problem, self.pause = None, EVERY_SECONDS
        except Exception as error:  # training goes on without its tracker
            if self.problem is None:
                log.warning("MLflow at %s: %s; the journals keep everything", self._uri, first_line(error))
            self.problem, self.pause = first_line(error), min(2 * self.pause, LONGEST_PAUSE)
            self.tracker = None  # another store may answer there next time

    def mirror_end(self, rows: Sequence[RunStatus]) -> None:
        """Mirror and settle; repeat after a failure, as a server fails once or twice after its database restarted."""
        self.mirror(rows, settle=True)
        for _ in range(LAST_TRIES):
            if self.problem is None or self.is_stopped:
                return
            time.sleep(LAST_PAUSE)
            self.mirror(rows, settle=True)


class MirrorThread(Rounds):
    """A thread that mirrors a study while other processes train it."""

    _rows: Sequence[RunStatus] = ()

    def start(self) -> None:
        """Start mirroring."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def show(self, rows: Sequence[RunStatus]) -> None:
        """Replace the rows that the next round mirrors."""
        self._rows = rows

    def finish(self, rows: Sequence[RunStatus]) -> None:
        """Mirror the end of the study and settle its runs; give up on a tracker that makes no progress."""
        self._rows = rows
        self._over.set()
        begun = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.2)
            waited = min(time.monotonic() - begun, self.watch.silence)
            if self.watch.is_silent or waited > STUCK_SECONDS:
                self.is_stopped = True
                again = hint("sync", self._study_name, root=self._arguments[2].path)
                log.warning("MLflow makes no progress; %s sends the rest", again)
                return

    def _work(self) -> None:
        while not self._over.is_set():
            self.mirror(self._rows)
            self._over.wait(self.pause)
        self.mirror_end(self._rows)


@contextmanager
def mirrored_beside(launch: Launch, root: Root, series_id: str) -> Iterator[None]:
    """Run a sidecar for the Series during the block if its launch.json names a tracker."""
    process = _start(launch, root, series_id) if launch.tracking else None
    try:
        yield
    finally:
        if process is not None and process.stdin is not None:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_SECONDS)


def _start(launch: Launch, root: Root, series_id: str) -> subprocess.Popen[bytes] | None:
    command = interpreter("-m", "harness.tracking.live", str(launch.control.parent), series_id)
    hidden = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    log_file = root.series(series_id) / "logs" / "mirror.log"
    try:
        # Unlike a signal, the end of its input cannot come before the sidecar is ready.
        return start_logged(command, log_file, env=environment, stdin=subprocess.PIPE)
    except (OSError, InputError) as error:  # no process or disk space left, or a link: training goes on
        log.warning("series %s is not mirrored while it trains: %s", series_id, error)
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Mirror a Series of a study until standard input ends; return the exit status."""
    study_dir, series_id = arguments if arguments is not None else sys.argv[1:]
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # it shares its cores with training
    log_to_stderr(logging.WARNING)
    try:
        _go_along(Path(study_dir).absolute(), series_id, signals)
    except InputError as error:
        log.error("%s", error)
        return 2
    return 0


def _go_along(study_dir: Path, series_id: str, signals: Sequence[int]) -> None:
    from harness.record.registry import resolve_registered

    root = Root(study_dir.parent.parent)
    uri = read_launch(root, series_id).tracking
    if uri is None or is_sqlite(uri):
        raise InputError(f"series {series_id}: its launch.json names no tracker for other machines")
    path = root.series(series_id) / "launch.json"
    if not may_receive_logins(uri, path):
        later = f"run {hint('sync', study_dir.name, root=root.path)} afterwards"
        believe(path, f"that logins are sent to {redact(uri)}", later)
    resolved = resolve_registered(root, study_dir.name)
    if resolved is None:
        raise InputError(f"{study_dir}: no study here; give ROOT/studies/NAME")
    points = [point for point in resolved.points if point.run.series_id == series_id]
    reader = StatusReader(root, study_dir.name)
    rounds = Rounds(uri, study_dir.name, root, with_study=False)
    in_thread(lambda: _end_if_silent(rounds.watch))
    deadline = float("inf")
    while not _input_has_ended() and time.monotonic() < deadline:
        rounds.mirror(reader.read(points))
        next_round = time.monotonic() + rounds.pause
        while time.monotonic() < next_round and not _input_has_ended(seconds=0.1):
            if signals and deadline == float("inf"):
                deadline = time.monotonic() + PARENT_SECONDS
    rounds.mirror_end(_read_at_rest(reader, points))


def _end_if_silent(watch: Watch) -> None:
    """End the process once its input has ended while the tracker does not answer."""
    while not (_input_has_ended(seconds=1.0) and watch.is_silent):
        time.sleep(1.0)
    log.warning("MLflow does not answer; `ssmscale sync` sends the rest")
    os._exit(0)


def _read_at_rest(reader: StatusReader, points: Sequence[GridPoint]) -> list[RunStatus]:
    """Read the state of the Runs once their trainer has ended: a killed process closes its files before it ends."""
    deadline = time.monotonic() + ENDING_SECONDS
    rows = reader.read(points)
    while any(row.state is RunState.RUNNING for row in rows) and time.monotonic() < deadline:
        time.sleep(0.05)
        rows = reader.read(points)
    return rows


def _input_has_ended(seconds: float = 0.0) -> bool:
    """Wait up to `seconds`; return True if no process holds the other end of standard input."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


if __name__ == "__main__":
    sys.exit(main())
