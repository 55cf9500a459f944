"""A submission that stays in the foreground until the study is done or the user ends it: on this machine's own
workers, or packed on a Ray that is started here for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.cluster import this_machine
from harness.disk import DiskFull
from harness.dispatch.local import LocalDispatcher
from harness.mirror import MirrorThread
from harness.plan import Plan
from harness.progress import StudyProgress
from harness.status import RunState, RunStatus, StatusReader
from harness.submission import ResolvedStudy, Submission
from harness.terminal import console, counted, errors, stoppable
from harness.tracking import tracking_uri


class Stopped(Exception):
    """The user ended a submission; the same command goes on from there."""


def train_here(resolved: ResolvedStudy, plan: Plan) -> list[RunStatus]:
    """Train what is missing on this machine, mirroring into MLflow on the way; returns how every Run ended.

    Raises Stopped after Ctrl-C or SIGTERM, when all workers have saved and gone, and DiskFull where no room was left
    to go on, when they have gone.
    """
    study, root = resolved.study, resolved.root
    reader = StatusReader(root, study.name)
    rows = reader.read(resolved.points)
    if not plan.missing and not any(row.state in {RunState.RUNNING, RunState.QUEUED} for row in rows):
        return rows
    dispatcher = LocalDispatcher(this_machine(), root.study(study.name) / "logs", study.resources.jobs)
    mirror = MirrorThread(tracking_uri(study, root), study.name, root)
    submission = Submission(resolved, plan, dispatcher, "local")
    series = len({run.status.series_id for run in plan.missing})
    if plan.missing:
        console.print(
            f"{counted(len(plan.missing), 'run')} to train in {counted(series, 'series')}; starting workers"
        )
    else:
        console.print("everything that is missing is being trained by another process; waiting for it")
    with stoppable(), StudyProgress(console) as progress:
        mirror.start()

        def on_progress(now: Sequence[RunStatus]) -> None:
            progress.show(now)
            mirror.show(now)

        try:
            rows = submission.run(on_progress)
        except KeyboardInterrupt as interrupt:
            progress.stop()
            errors.print("stopping: workers save what they have")
            dispatcher.close()
            mirror.finish(reader.read(resolved.points, submitter=submission.process))
            raise Stopped from interrupt
        except DiskFull:
            progress.stop()
            dispatcher.close()
            mirror.finish(reader.read(resolved.points, submitter=submission.process))
            raise
        finally:
            dispatcher.close()
        mirror.finish(rows)
    return rows
