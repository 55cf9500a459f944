"""What becomes of a Series that comes back again and again: it is given up, and a retry begins anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.dispatch.base import Handle, Job
from harness.dispatch.supervise import InHand
from harness.record.control import Control
from harness.record.jobs import JobState
from harness.record.journal import read_progress
from harness.record.registry import ResolvedStudy
from harness.record.series import unfinished
from harness.submit.monitor import rows_of
from harness.submit.submission import forgive
from harness.train.stopping import MOST_ATTEMPTS


class Losing:
    """A dispatcher all of whose workers go away without a word."""

    def submit(self, jobs: Sequence[Job]) -> list[Handle]:
        return [Handle(job, "0") for job in jobs]

    def poll(self, handles: Sequence[Handle]) -> Mapping[Handle, JobState]:
        return dict.fromkeys(handles, JobState.LOST)

    def cancel(self, handles: Sequence[Handle]) -> None:
        raise AssertionError

    def log_paths(self, handle: Handle) -> list[Path]:
        return [handle.job.log_dir / "rank-0.log"]

    def close(self) -> None:
        return


def test_a_retry_has_as_many_attempts_as_the_first_submission(resolved: ResolvedStudy) -> None:
    root, name = resolved.root, resolved.study.name
    control = Control(root.study(name) / "control.jsonl")
    in_hand = InHand(root, control, Losing())
    run_dirs = tuple(root.run(point.run_id) for point in resolved.points)
    series = resolved.points[0].series_id
    job = Job(
        series_id=series, run_dirs=run_dirs, nodes=1, ranks=1, threads=1, log_dir=root.series(series) / "logs"
    )

    def lost() -> int:
        """Times it is handed over until it is given up."""
        times = 0
        while unfinished(run_dirs, control):
            in_hand.hand_over([job])
            in_hand.watch()
            times += 1
        return times

    assert lost() == MOST_ATTEMPTS
    assert "its worker ended 3 times at the same place" in str(
        (read_progress(run_dirs[0]).result or {})["reason"]
    )
    assert len(forgive(root, name, rows_of(resolved))) == len(run_dirs)
    assert lost() == MOST_ATTEMPTS
