"""A submission that supervises its tasks in the foreground until the study is done or the user ends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from harness.common.console import Stopped, console, errors, stoppable
from harness.common.disk import DiskFull
from harness.common.format import counted
from harness.common.streams import outlasting_output
from harness.dispatch.base import Backend
from harness.plan.plan import Plan
from harness.record.registry import ResolvedStudy
from harness.record.status import RunState, RunStatus, StatusReader
from harness.submit.submission import Submission
from harness.tracking.live import MirrorThread
from harness.tracking.store import tracking_uri


class Progress(AbstractContextManager["Progress"], Protocol):
    """A display of the progress of a study's Runs, shown during a block."""

    def show(self, rows: Sequence[RunStatus]) -> None:
        """Show the state of every Run."""

    def stop(self) -> None:
        """Stop the display, so that messages can be printed."""


def train_here(resolved: ResolvedStudy, plan: Plan, backend: Backend, progress: Progress) -> list[RunStatus]:
    """Train the missing Runs on a backend of this process, mirroring into MLflow; returns the state of every Run.

    Raises Stopped after Ctrl-C or SIGTERM and DiskFull if the disk is full, both after all workers have saved and
    ended, and RayDown if Ray does not start.
    """
    study, root = resolved.study, resolved.root
    reader = StatusReader(root, study.name)
    rows = reader.read(resolved.points)
    if not plan.missing and not any(row.state in {RunState.RUNNING, RunState.QUEUED} for row in rows):
        known = [run.status for run in plan.runs]  # the schedulers were asked too
        waiting = {row.series_id for row in known if row.state in {RunState.RUNNING, RunState.QUEUED}}
        _print_left(dict.fromkeys(waiting, study.name))
        return known
    mirror = MirrorThread(tracking_uri(study, root), study.name, root)
    submission = Submission(resolved, plan, backend)

    def cut_short() -> None:
        mirror.finish(reader.read(resolved.points, submitter=submission.process))

    with outlasting_output(), backend:
        if plan.missing:
            runs = counted(len(plan.missing), "run")
            series = counted(len({run.status.series_id for run in plan.missing}), "series")
            console.print(f"{runs} to train in {series}; starting workers")
        else:
            console.print("another process trains all missing runs; waiting for it")
        with stoppable() as poll_stop, progress:
            mirror.start()

            def on_progress(now: Sequence[RunStatus]) -> None:
                poll_stop()
                progress.show(now)
                mirror.show(now)

            with closing_in_order(backend.close, cut_short, progress.stop):
                rows = submission.supervise(on_progress)
            mirror.finish(rows)
    _print_left(submission.left)
    return rows


@contextmanager
def closing_in_order(
    close: Callable[[], None], cut_short: Callable[[], None], quieten: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Call `close`, which ends the workers, whenever the block ends; after Ctrl-C raise Stopped.

    After Ctrl-C or on a full disk call `quieten` first, so that messages can be printed, and `cut_short` after `close`.
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


def _print_left(left: Mapping[str, str]) -> None:
    """Print the studies to whose jobs Series were left."""
    for study, series in sorted(Counter(left.values()).items()):
        console.print(
            f"{counted(series, 'series')} left to jobs of study {study}; see `ssmscale status {study}`"
        )
