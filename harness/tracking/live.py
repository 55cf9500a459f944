"""A mirror that goes along with training: a thread of the submitting process, or a process beside a worker.

    python -m harness.tracking.live STUDY_DIR SERIES_ID...    mirror those Series until standard input ends

Neither is in a process that trains: importing MLflow alone would stop every other thread there for seconds. There is no
queue, so memory does not grow with what a tracker has not taken: each round begins with the newest state of the study,
reads on in the journals of Series that are not over, sends what MLflow has not, and waits. A tracker that is slow,
refuses or is gone costs one warning; it is tried again, less and less often, and has everything when it is back.

A process beside a worker is for jobs that a scheduler starts elsewhere; it is never given an SQLite file, which only
one machine may open. It holds one end of a pipe whose other end is the worker's: the end of its standard input means
that its Series is over, or that the worker is gone; SIGTERM, from a scheduler, that it soon will be. It runs with less
priority and in a session of its own, and is never waited for long: `ssmscale sync` sends what is left.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.common.validation import first_line
from harness.record.root import Launch, Root, read_launch
from harness.record.status import RunState, RunStatus, StatusReader
from harness.study.grid import GridPoint
from harness.tracking.store import redact
from harness.tracking.tracker import Tags, Tracker
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.tracking")

LONGEST_PAUSE = 60.0
"""Seconds between two attempts at a tracker that is gone, at most."""
STUCK_SECONDS = 120.0
"""Wait for a tracker that gets nowhere at the end of a submission; `ssmscale sync` brings the rest."""
LAST_TRIES, LAST_PAUSE = 4, 1.0
"""Times that a last round that failed is tried again, and the seconds before each."""
ENDING_SECONDS = 5.0
"""Time a trainer has to end once it has let go of its mirror."""
PARENT_SECONDS = 120.0
"""Time a worker has to save and go after SIGTERM."""
LAST_SECONDS = 5.0
"""Time a finished Series waits for its mirror's last round."""


class Rounds:
    """One study's mirroring, round after round; whatever a tracker does, a round ends without an error."""

    def __init__(
        self, uri: str, study_name: str, root: Root, tags_of: Tags = lambda _: {}, *, with_study: bool
    ) -> None:
        self._uri, self._arguments = redact(uri), (uri, study_name, root, tags_of)
        self._with_study = with_study
        self.problem: str | None = None
        """The error of the newest round, if any."""
        self.tracker: Tracker | None = None

    def go(
        self, rows: Sequence[RunStatus], *, settle: bool, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Mirror once."""
        try:
            if self.tracker is None:
                self.tracker = Tracker(*self._arguments)
            done = self.tracker.mirror(rows, settle=settle, with_study=self._with_study, stopped=stopped)
            for note in done.notes:
                log.warning("%s", note)
            if self.problem is not None:
                log.info("MLflow is back and has everything")
            self.problem = None
        except Exception as error:  # whatever a tracker does, training goes on
            if self.problem is None:
                log.warning("MLflow at %s: %s; the journals keep everything", self._uri, first_line(error))
            self.problem = first_line(error)
            self.tracker = None  # it may come back as another one: nothing that was known of it holds

    def retry(self, rows: Sequence[RunStatus], stopped: Callable[[], bool] = lambda: False) -> None:
        """Try the last round again where it failed: a server whose database was restarted stumbles once or twice."""
        for _ in range(LAST_TRIES):
            if self.problem is None or stopped():
                return
            time.sleep(LAST_PAUSE)
            self.go(rows, settle=True, stopped=stopped)


class MirrorThread:
    """Mirrors while training goes on: the trainer's processes know nothing of it, its failures cost one warning."""

    def __init__(
        self,
        uri: str,
        study_name: str,
        root: Root,
        every_seconds: float = 3.0,
        tags_of: Tags = lambda _: {},
    ) -> None:
        self._rounds = Rounds(uri, study_name, root, tags_of, with_study=True)
        self._study_name, self._every = study_name, every_seconds
        self._rows: Sequence[RunStatus] = ()
        self._wake = threading.Event()
        self._over = self._given_up = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)

    @property
    def problem(self) -> str | None:
        """The error of the newest round, if any."""
        return self._rounds.problem

    def start(self) -> None:
        """Begin mirroring; returns at once."""
        self._thread.start()

    def show(self, rows: Sequence[RunStatus]) -> None:
        """Give the newest state of the study; the next round mirrors it, and older rows are dropped."""
        self._rows = rows

    def finish(self, rows: Sequence[RunStatus]) -> None:
        """Mirror the end of the study and settle runs without a process; returns when that is done or gets nowhere."""
        self._rows, self._over = rows, True
        self._wake.set()
        seen, since = -1, time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.2)
            tracker = self._rounds.tracker
            visits = tracker.visits if tracker else 0
            if visits != seen:
                seen, since = visits, time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                self._given_up = True
                log.warning("MLflow does not get on; `ssmscale sync %s` brings the rest", self._study_name)
                return

    def _work(self) -> None:
        pause = self._every
        while True:
            over = self._over
            self._rounds.go(self._rows, settle=over, stopped=lambda: self._given_up)
            if over:
                self._rounds.retry(self._rows, stopped=lambda: self._given_up)
                return
            pause = min(2 * pause, LONGEST_PAUSE) if self._rounds.problem else self._every
            self._wake.wait(pause)


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
    command = [sys.executable, "-m", "harness.tracking.live", str(launch.control.parent), series_id]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Mirror some Series of a study until standard input ends; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.tracking.live", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("study_dir", type=Path, metavar="STUDY_DIR", help="ROOT/studies/NAME")
    parser.add_argument("series", nargs="+", metavar="SERIES_ID")
    parser.add_argument("--every", type=float, default=3.0, metavar="SECONDS", help="between two rounds")
    options = parser.parse_args(arguments)
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # it shares its cores with training
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        _go_along(options.study_dir.absolute(), options.series, options.every, signals)
    except InputError as error:
        log.error("%s", error)
        return 2
    return 0


def _go_along(study_dir: Path, series: Sequence[str], every: float, signals: Sequence[int]) -> None:
    from harness.record.registry import resolve_registered

    root = Root(study_dir.parent.parent)
    uri = read_launch(root, series[0]).tracking
    if uri is None or uri.startswith("sqlite"):
        raise InputError(
            f"series {series[0]}: its launch.json names no tracker a second machine may write to"
        )
    resolved = resolve_registered(root, study_dir.name)
    if resolved is None:
        raise InputError(f"{study_dir}: holds no study; it is ROOT/studies/NAME")
    points = [point for point in resolved.points if point.run.series_id in set(series)]
    reader = StatusReader(root, study_dir.name)
    rounds = Rounds(uri, study_dir.name, root, with_study=False)
    pause = every
    deadline = float("inf")
    while True:
        over = _input_has_ended() or time.monotonic() > deadline
        rounds.go(_read_at_rest(reader, points) if over else reader.read(points), settle=over)
        if over:
            rounds.retry(reader.read(points))
            return
        pause = min(2 * pause, LONGEST_PAUSE) if rounds.problem else every
        awake = time.monotonic() + pause
        while time.monotonic() < awake and not _input_has_ended(seconds=0.1):
            if signals and deadline == float("inf"):
                deadline = time.monotonic() + PARENT_SECONDS


def _read_at_rest(reader: StatusReader, points: Sequence[GridPoint]) -> list[RunStatus]:
    """Read the state of the Runs once their trainer is gone: a killed process closes its files before it ends."""
    deadline = time.monotonic() + ENDING_SECONDS
    rows = reader.read(points)
    while any(row.state is RunState.RUNNING for row in rows) and time.monotonic() < deadline:
        time.sleep(0.05)
        rows = reader.read(points)
    return rows


def _input_has_ended(seconds: float = 0.0) -> bool:
    """True if no process holds the other end of standard input any more; waits up to so long for that."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


if __name__ == "__main__":
    sys.exit(main())
