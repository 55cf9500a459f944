"""A submission that supervises its tasks in the foreground until the study is done or the user ends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from harness.common.console import Stopped, console, errors, stoppable
from harness.common.disk import DiskFull
from harness.common.format import counted
from harness.dispatch.base import Backend
from harness.plan.plan import Plan
from harness.record.registry import ResolvedStudy
from harness.record.status import RunState, RunStatus, StatusReader
from harness.submit.submission import Submission
from harness.tracking.live import MirrorThread
from harness.tracking.store import tracking_uri


class Progress(Protocol):
    """A display of how a study's Runs get on."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Stop showing."""

    def show(self, rows: Sequence[RunStatus]) -> None:
        """Show where every Run is now."""

    def stop(self) -> None:
        """Leave the terminal to messages."""


def train_here(resolved: ResolvedStudy, plan: Plan, backend: Backend, progress: Progress) -> list[RunStatus]:
    """Train what is missing by a backend of this process, mirroring into MLflow; returns how every Run ended.

    Raises Stopped after Ctrl-C or SIGTERM, when all workers have saved and gone, DiskFull where no room was left to go
    on, when they have gone, and RayDown where Ray does not start.
    """
    study, root = resolved.study, resolved.root
    rows = StatusReader(root, study.name).read(resolved.points)
    if not plan.missing and not any(row.state in {RunState.RUNNING, RunState.QUEUED} for row in rows):
        known = [run.status for run in plan.runs]  # by SLURM's word too
        waiting = {row.series_id for row in known if row.state in {RunState.RUNNING, RunState.QUEUED}}
        _tell_left(dict.fromkeys(waiting, study.name))
        return known
    with backend:
        return _train(resolved, plan, backend, progress)


def _train(resolved: ResolvedStudy, plan: Plan, backend: Backend, progress: Progress) -> list[RunStatus]:
    study, root = resolved.study, resolved.root
    reader = StatusReader(root, study.name)
    mirror = MirrorThread(tracking_uri(study, root), study.name, root)
    submission = Submission(resolved, plan, backend)
    series = len({run.status.series_id for run in plan.missing})
    if plan.missing:
        console.print(
            f"{counted(len(plan.missing), 'run')} to train in {counted(series, 'series')}; starting workers"
        )
    else:
        console.print("everything that is missing is being trained by another process; waiting for it")
    with stoppable() as poll_stop, progress:
        mirror.start()

        def on_progress(now: Sequence[RunStatus]) -> None:
            poll_stop()
            progress.show(now)
            mirror.show(now)

        def cut_short() -> None:
            mirror.finish(reader.read(resolved.points, submitter=submission.process))

        with closing_in_order(backend.close, cut_short, progress.stop):
            rows = submission.supervise(on_progress)
        mirror.finish(rows)
    _tell_left(submission.left)
    return rows


@contextmanager
def closing_in_order(
    close: Callable[[], None], cut_short: Callable[[], None], quieten: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Close what trains here when the block ends, however it does; Ctrl-C ends it with Stopped.

    Ctrl-C and a full disk cut training short: `quieten` then leaves the terminal to messages, and `cut_short` follows
    when all workers have saved and gone.
    """
    try:
        yield
    except (KeyboardInterrupt, DiskFull) as cause:
        quieten()
        is_stopped = isinstance(cause, KeyboardInterrupt)
        if is_stopped:
            errors.print("stopping: workers save what they have")
        close()
        cut_short()
        if is_stopped:
            raise Stopped from cause
        raise
    finally:
        close()


def _tell_left(left: Mapping[str, str]) -> None:
    """Say which studies' jobs Series were left to."""
    for study, series in sorted(Counter(left.values()).items()):
        console.print(
            f"{counted(series, 'series')} left to jobs of study {study}; `ssmscale status {study}` shows how they do"
        )
