"""On a real SLURM: a study is submitted once, its jobs meet every fault, and it finishes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.record.journal import Event, attempts, read_progress
from harness.record.root import Root
from harness.tracking.store import default_uri
from tests.cluster.slurm_study import Make, SlurmStudy, wake
from tests.harness.faults import check_mirrored
from tests.harness.journals import read_events
from tests.harness.trainer import losses, prepared
from tests.studies import Fields
from tests.waiting import PATIENCE, is_running, wait_until

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.verify)])
def test_a_study_submitted_once_finishes_whatever_befalls_its_jobs(
    make: Make, study_fields: Fields, empty_store: Path, tmp_path: Path, ranks: int
) -> None:
    # Two ranks on two of the nodes' fake GPUs each would leave none for two of the jobs.
    study = make(eighteen_runs(study_fields, ranks), gpus=2 if ranks == 1 else 0)
    study.step_seconds = 0.05  # the faults meet six Series before their trunks end
    study.root.path.mkdir(parents=True)
    shutil.copy(empty_store, study.root.path / "mlflow.db")
    assert "18 runs in 6 series submitted to dev" in study.submit()

    everyone = sorted(study.tasks())
    held = study.hold(dict.fromkeys(everyone, 30))
    nodes = study.nodes()
    killed, timed_out, *silent = [series for series in everyone if nodes[series] == "n1"]
    preempted = [series for series in everyone if nodes[series] == "n2"]
    assert silent
    assert preempted
    with undisturbed(tmp_path, study) as apart:
        with drained(study, "n1"):
            study.make_room("n2")  # SLURM itself wakes the ranks that it signals
            held[killed][-1].kill()
            study.near_time_limit(timed_out)
            wake(*held[killed][:-1], *held[timed_out])
            # They wait for a few seconds only: n2 has free GPUs for them, too.
            wait_until(lambda: {study.nodes().get(series) for series in (killed, timed_out)} <= {None, "n2"})
            with fallen_silent(study, "n1"):
                once_more = study.hold({series: read_progress(series).step + 10 for series in preempted})
                study.make_room("n2")
                told_to_leave = 2 * len(preempted)
                wait_until(lambda: study.count(Event.PREEMPTED, reason="SIGTERM") >= told_to_leave)

                wait_until(lambda: all(len(attempts(series)) > 1 for series in silent))
                lines = {series: events_of(series, attempt=1) for series in silent}
                left = [process for series in silent for process in held[series]]
                wake(*left)
                wait_until(lambda: not any(map(is_running, left)))
                assert {series: events_of(series, attempt=1) for series in silent} == lines  # fenced off
        study.wait_until_over()
        expected = apart()
    assert losses(study.root, study.fields) == expected
    assert not any(is_running(process) for processes in once_more.values() for process in processes)

    assert study.count(Event.PREEMPTED, reason="SIGUSR2") == 1
    for series in everyone:
        assert read_progress(series).attempt >= (3 if series in preempted else 2)
    for folder in study.journals():
        check_nothing_but_unsaved_steps_was_lost(folder)
    assert "18 finished runs are in" in study.run("sync")
    check_mirrored(default_uri(study.root), "tiny", study.journals())
    assert study.status()["counts"] == {"done": 18}
    assert "nothing of tiny is left to submit" in study.submit()


def eighteen_runs(fields: Fields, ranks: int) -> Fields:
    fields["grid"] = {
        "architectures": {"prefix_simba": None, "cross_transformer": None},
        "sizes": {
            "xs": {"n_blocks": 1, "d_model": 16},
            "s": {"n_blocks": 1, "d_model": 24},
            "m": {"n_blocks": 2, "d_model": 16},
        },
        "iterations": [20, 60, 160],
    }
    fields["resources"] = {"ranks": ranks, "zero_stage": 0 if ranks == 1 else 1, "checkpoint_every": 20}
    return fields


@contextmanager
def drained(study: SlurmStudy, node: str) -> Iterator[None]:
    """Have a node keep its jobs and take no more during the block."""
    study.slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=testing")
    try:
        yield
    finally:
        study.slurm("scontrol", "update", f"nodename={node}", "state=resume")


@contextmanager
def fallen_silent(study: SlurmStudy, node: str) -> Iterator[None]:
    """End a node's slurmd and leave its jobs; SLURM starts them elsewhere once it has noticed."""
    study.cluster.stop_node(node)
    try:
        yield
    finally:
        study.cluster.start_node(node)


@contextmanager
def undisturbed(tmp_path: Path, study: SlurmStudy) -> Iterator[Any]:
    """Train the same study apart, on the same layout, during the block; yields a function that waits for its losses."""
    resources = study.fields["resources"]
    apart, launch = Root(tmp_path / "apart"), {"checkpoint_every": resources["checkpoint_every"]}
    groups = prepared(apart, study.fields, zero_stage=resources["zero_stage"], **launch)
    run_dirs = [str(apart.run(run.run_id)) for _, runs in groups for run in runs]
    starter = (
        ["-m"]
        if resources["ranks"] == 1
        else [
            *("-m", "torch.distributed.run", "--nproc_per_node", str(resources["ranks"])),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m"),
        ]
    )
    with (tmp_path / "apart.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, *starter, "harness.train.worker", *run_dirs],
            stdout=log,
            stderr=log,
            env={**study.environment, "PACED_STEP_SECONDS": "0"},
        )

    def finish() -> list[float]:
        assert worker.wait(PATIENCE) == 0, (tmp_path / "apart.log").read_text()[-3000:]
        for folder in study.root.path.glob("series/*"):
            ours, theirs = read_progress(folder).started, read_progress(apart.series(folder.name)).started
            assert ours is not None
            assert theirs is not None
            assert ours["layout"] == theirs["layout"]
        return losses(apart, study.fields)

    try:
        yield finish
    finally:
        worker.kill()
        worker.wait()


def events_of(folder: Path, attempt: int) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["attempt"] == attempt]


def check_nothing_but_unsaved_steps_was_lost(folder: Path) -> None:
    """Each attempt begins where the newest checkpoint was made, and no step is missing in the end."""
    saved = done = first = None
    for attempt in attempts(folder):
        events = events_of(folder, attempt)
        steps = [event["step"] for event in events if event["event"] == Event.STEP]
        if steps:
            begun = min(steps) - 1
            if first is None:
                saved = done = first = begun
            assert saved <= begun <= done, (
                f"attempt {attempt} of {folder} begins at {begun}, saved were {saved}"
            )
        saved = max([saved or 0, *(event["step"] for event in events if event["event"] == Event.CHECKPOINT)])
        done = max([done or 0, *steps])
    assert sorted(read_progress(folder).steps) == list(range((first or 0) + 1, (done or 0) + 1))
