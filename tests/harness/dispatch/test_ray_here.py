"""`submit --on ray` on one machine, with a real Ray and warm ranks, of which some are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.common.process import process_is_alive
from harness.record.journal import read_progress
from harness.record.root import Root
from tests.conftest import Write
from tests.harness.journals import read_events
from tests.harness.rays import WITHOUT_DASHBOARD, WITHOUT_MLFLOW
from tests.harness.trainer import losses, undisturbed
from tests.studies import Fields
from tests.waiting import PATIENCE, paced, wait_until


def test_a_study_packed_on_a_ray_here_ends_like_an_undisturbed_one_though_ranks_and_an_actor_are_killed_or_stopped(
    study_fields: Fields, write_study: Write, tmp_path: Path
) -> None:
    study_fields["grid"] |= {"seeds": [0, 1, 2], "iterations": [5, 30]}
    study_fields["resources"] = {"checkpoint_every": 5, "stall_seconds": 6}
    study, root = write_study(study_fields), Root(tmp_path / "runs")
    # In a session of its own, so that all that it leaves behind can be found.
    submission = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_MLFLOW + WITHOUT_DASHBOARD, "submit", str(study), "--on", "ray"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**paced(0.06), "SSMSCALE_TEST_MARK": str(tmp_path)},
    )
    hit: dict[Path, psutil.Process] = {}

    def one_more_trains() -> bool:
        """Return True once a Series not yet hit is past some checkpoint; note its rank."""
        assert submission.poll() is None, submission.communicate()[0]
        for folder in {*(root.path / "series").glob("*")} - hit.keys():
            told = read_progress(folder)
            if told.step > 5 and told.is_alive and told.started is not None:
                hit[folder] = psutil.Process(told.started["pid"])
                return True
        return False

    wait_until(one_more_trains)
    (rank,) = hit.values()
    rank.kill()
    wait_until(one_more_trains)
    other = list(hit.values())[-1]
    (actor,) = [process for process in psutil.process_iter() if _feeds(process, other)]
    assert "RankActor" in " ".join(actor.cmdline())
    actor.kill()
    wait_until(one_more_trains)
    list(hit.values())[-1].suspend()
    said, _ = submission.communicate(timeout=PATIENCE)
    assert submission.returncode == 0, said
    assert "6 done" in said

    assert losses(root, study_fields) == pytest.approx(undisturbed(study_fields), abs=1e-6)
    starts = {
        folder: [event for event in read_events(folder) if event["event"] in {"started", "resumed"}]
        for folder in sorted((root.path / "series").glob("*"))
    }
    assert sorted(len(events) for events in starts.values()) == [2, 2, 2]
    ended = {e["kind"]: e for folder in starts for e in read_events(folder) if e["event"] == "preempted"}
    assert (
        ended["signal"]["reason"] == "SIGTERM"
    )  # the rank outlived its actor for as long as it took to save
    assert "in step" in ended["stalled"]["reason"]
    logs = [log.read_text() for folder in starts for log in folder.glob("logs/rank-*.log")]
    assert any("most recent call first" in text for text in logs)
    for run in (root.path / "runs").glob("*"):
        assert [event["event"] for event in read_events(run)].count("finished") == 1

    launched = json.loads((next(iter(starts)) / "launch.json").read_text())
    assert launched["dispatcher"] == "ray"
    wait_until(
        lambda: (
            not any(process_is_alive(event) for events in starts.values() for event in events)
            and not [p for p in psutil.process_iter() if _is_marked(p, str(tmp_path))]
        )
    )


def _feeds(process: psutil.Process, rank: psutil.Process) -> bool:
    """Return True if a process holds the other end of a rank's standard input."""
    pipe = Path(f"/proc/{rank.pid}/fd/0").readlink()
    try:
        return process != rank and any(
            end.readlink() == pipe for end in Path(f"/proc/{process.pid}/fd").iterdir()
        )
    except OSError:
        return False


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("SSMSCALE_TEST_MARK") == mark
    except psutil.Error:
        return False
