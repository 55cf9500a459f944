"""`status` by the journals: GPU-hours used and left, and a display that fits its terminal."""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.cli import status as status_verb
from harness.cli.status import _Display, print_status, watch_status
from harness.common.console import console, errors
from harness.common.validation import validate
from harness.dispatch.arrays import Array, ArrayStore
from harness.dispatch.base import Task
from harness.plan.allocation import Shape
from harness.record.heartbeat import Activity, Heartbeat, describe_pause
from harness.record.hours import Hours, JobTime, count_hours
from harness.record.journal import Event, Progress, Span, read_progress
from harness.record.kinds import Kind
from harness.record.registry import resolve
from harness.record.root import Root
from harness.record.series import note_stall
from harness.record.status import RunState
from harness.study.grid import GridPoint
from harness.study.schema import Study
from harness.submit.monitor import StudyMonitor, StudySnapshot
from harness.train.stopping import GPU_SHARE
from tests.harness.journals import begin_run, begin_series, finish, log_steps, registered, rows_of
from tests.harness.trainer import series_folder, train
from tests.programs import write_program
from tests.studies import Fields, with_iterations


@pytest.fixture
def points(study_fields: Fields) -> list[GridPoint]:
    """Two Series of runs of 10 and 100 iterations, which branch at 8 and 80."""
    study_fields["grid"] |= {"iterations": [10, 100], "seeds": [0, 1]}
    return list(resolve(validate(Study, study_fields, "test"), Root(Path("runs")), "test").points)


def hours_of(
    points: list[GridPoint],
    journals: dict[str, Progress],
    wanted: list[GridPoint] | None = None,
    jobs: dict[str, JobTime] | None = None,
) -> Hours:
    """Return the hours by these journals; all others are empty."""
    return count_hours(
        points,
        {point.series_id: journals.get(point.series_id, Progress()) for point in points},
        {point.run_id: journals.get(point.run_id, Progress()) for point in points},
        [point.run_id for point in (points if wanted is None else wanted)],
        jobs or {},
    )


def worked(*spans: tuple[Any, ...]) -> Progress:
    """Make attempts of (begun, ended, job_id, ranks, gpu_share)."""
    return Progress(spans=tuple(Span(*span) for span in spans))


def timed(step: int, tokens_per_second: float, ranks: int = 1, **started: float) -> Progress:
    event = {"t": 1.0, "step": step, "loss": 1.0, "tokens_per_second": tokens_per_second}
    return Progress(step=step, steps={step: event}, started={"layout": {"ranks": ranks}, **started})


def test_a_run_that_left_the_trunk_before_its_end_does_not_show_the_later_loss_of_the_trunk(
    tmp_path: Path, study_fields: Fields
) -> None:
    root = Root(tmp_path)
    short, long = registered(root, with_iterations(study_fields, 10, 100)).points
    with begin_series(root, long.run) as trunk:
        log_steps(trunk, range(1, 9))
        assert [row.train_loss for row in rows_of(root, with_iterations(study_fields, 10, 100))] == [
            4.992
        ] * 2
        log_steps(trunk, [20])
        root.control("tiny").append("cancelled", runs=[short.run_id])
        ours, others = rows_of(root, with_iterations(study_fields, 10, 100))
    assert (ours.state, ours.iterations_done, ours.train_loss) == (RunState.CANCELLED, 8, None)
    assert others.train_loss == 4.98


def test_every_attempt_counts_by_its_share_and_a_branch_during_its_trunk_counts_once(
    points: list[GridPoint],
) -> None:
    first = points[0]
    trunk = worked((0, 1800, "a", 2), (3600, 5400, "b", 4), (7200, 9000, "c", 1, 0.25))
    branch = worked((900, 1200, "a", 2))
    hours = hours_of(points, {first.series_id: trunk, first.run_id: branch})
    assert hours.used[first.series_id] == pytest.approx(0.5 * 2 + 0.5 * 4 + 0.5 * 0.25)
    assert hours.used_in_all == hours.used[first.series_id]


def test_a_schedulers_accounts_replace_the_journals_of_its_jobs(points: list[GridPoint]) -> None:
    series_id = points[0].series_id
    trunk = worked((0, 1800, "12_0", 2), (3600, 5400, "local", 1))
    accounts = {"12_0": JobTime(series_id, 7200.0), "12_1": JobTime("elsewhere", 9e9)}
    used = hours_of(points, {series_id: trunk}, jobs=accounts).used
    assert used == {series_id: pytest.approx(2.0 + 0.5), points[-1].series_id: 0.0}


@pytest.mark.parametrize(("started", "devices"), [({"ranks": 4}, 4.0), ({"gpu_share": 0.25}, 0.25)])
def test_hours_left_follow_the_measured_speed_and_the_share_of_a_gpu(
    points: list[GridPoint], started: dict[str, Any], devices: float
) -> None:
    short, long = points[:2]
    journals = {short.series_id: timed(step=8, tokens_per_second=short.run.tokens_a_step, **started)}
    left = hours_of(points[:2], journals).left
    assert left[short.run_id] == pytest.approx(2 * devices / 3600)  # its decay, a step a second
    assert left[long.run_id] == pytest.approx((72 + 20) * devices / 3600)
    left = hours_of(points[:2], journals, wanted=[long]).left  # the short one is over
    assert left == {short.run_id: 0.0, long.run_id: pytest.approx((72 + 20) * devices / 3600)}


def test_a_series_that_has_not_begun_takes_the_speed_of_another_of_its_size(points: list[GridPoint]) -> None:
    measured, unmeasured = points[0].series_id, points[-1].run_id
    tokens = points[0].run.tokens_a_step
    assert hours_of(points, {}).left[unmeasured] is None
    assert hours_of(points, {}).unknown == len(points)
    known = hours_of(points, {measured: timed(8, tokens)})
    assert known.left[unmeasured] == pytest.approx((72 + 20) / 3600)
    assert known.unknown == 0


def test_the_journal_tells_the_time_of_each_attempt(tmp_path: Path, study_fields: Fields) -> None:
    root = Root(tmp_path / "runs")
    run = registered(root, study_fields).points[0].run
    for job in ("1_0", "2_0"):
        with begin_series(root, run, job_id=job, layout={"ranks": 2}) as trunk:
            log_steps(trunk, [1, 2])
    spans = read_progress(root.series(run.series_id)).spans
    assert [(span.job_id, span.ranks) for span in spans] == [("1_0", 2), ("2_0", 2)]
    assert all(span.begun <= span.ended for span in spans)


def test_a_stall_in_the_start_of_a_later_attempt_adds_no_time_to_the_one_before(
    tmp_path: Path, study_fields: Fields
) -> None:
    root = Root(tmp_path)
    point = registered(root, study_fields).points[0]
    with begin_series(root, point.run) as trunk:
        trunk.append(Event.PREEMPTED, reason="SIGTERM", kind=Kind.SIGNAL)
    before = read_progress(root.series(point.series_id))
    note_stall(root, point.series_id, [root.run(point.run_id)], "nothing moved for 20 min in its start")
    after = read_progress(root.series(point.series_id))
    assert (after.kind, after.spans) == (Kind.STALLED, before.spans)


def test_status_says_for_how_long_nothing_moved_and_shows_no_speed(
    tmp_path: Path, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = registered(Root(tmp_path), study_fields)
    series, run = resolved.root.series(resolved.points[0].series_id), resolved.points[0].run
    with begin_series(resolved.root, run) as trunk:
        log_steps(trunk, range(1, 4))
        (series / "logs").mkdir()
        with monkeypatch.context() as before, Heartbeat(series, 0) as rank:
            then = time.time() - 430
            before.setattr("time.time", lambda: then)
            rank.move(Activity.EVALUATION, 3)
        snapshot = StudyMonitor(resolved).read()
        running = snapshot.rows[0]
        assert (running.state, running.tokens_per_second) == (RunState.RUNNING, None)
        assert running.reason == "nothing moved for 7 min in the evaluation after step 3"
        assert describe_pause(series, job_seconds=200) == (200, "nothing moved for 3 min in its start")
        screen = io.StringIO()
        print_status(Console(file=screen, width=120), snapshot)
        assert f"nothing moves in 1 series: run {running.run_id}, {running.reason}" in screen.getvalue()
        with Heartbeat(series, 0):
            assert StudyMonitor(resolved).read().rows[0].tokens_per_second == 1000.5


def test_a_worker_journals_its_share_of_a_gpu(
    tmp_path: Path, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_fields["grid"] |= {"iterations": [5]}
    root = Root(tmp_path / "runs")
    monkeypatch.setenv(GPU_SHARE, "0.25")
    train(root, study_fields)
    journals = [series_folder(root), *root.path.glob("runs/*")]
    assert [span.gpu_share for folder in journals for span in read_progress(folder).spans] == [0.25] * 2


@pytest.fixture
def snapshot(tmp_path: Path, study_fields: Fields) -> StudySnapshot:
    """Forty runs: one done, one in training by this process, the rest new."""
    root = Root(tmp_path / "runs")
    study_fields["grid"] |= {"iterations": [10], "seeds": list(range(40))}
    points = registered(root, study_fields).points
    finish(begin_run(root, points[0].run), points[0].run)
    with begin_series(root, points[-1].run) as trunk:
        log_steps(trunk, [3])
    rows = rows_of(root, study_fields)
    left = {row.run_id: None if row.state is RunState.NEW else 0.0 for row in rows}
    return StudySnapshot("tiny", rows, Hours({}, left), ())


def printed(snapshot: StudySnapshot, *, height: int | None = None) -> list[str]:
    text = io.StringIO()
    console = Console(
        file=text, width=100, height=height, force_terminal=False, highlight=False, markup=False
    )
    if height is None:
        print_status(console, snapshot, every_run=True)
    else:
        console.print(_Display(snapshot))
    return text.getvalue().splitlines()


def test_the_table_has_every_run_and_says_what_is_not_known(snapshot: StudySnapshot) -> None:
    lines = printed(snapshot)
    assert all(any(row.run_id in line for line in lines) for row in snapshot.rows)
    assert "1 done" in lines[-2]
    assert "38 new" in lines[-2]
    assert lines[-1] == "GPU-hours: 0 used, hours left are not known before a run has measured its speed"


def test_a_display_fits_the_terminals_height_and_shows_running_runs_first(snapshot: StudySnapshot) -> None:
    lines = printed(snapshot, height=12)
    assert len(lines) < 12
    assert any(snapshot.rows[-1].run_id in line and "running" in line for line in lines)
    assert not any(snapshot.rows[0].run_id in line for line in lines)  # it is done, and shown last
    assert any(line.startswith("and 34 more: 1 done, 33 new") for line in lines)


def test_watching_goes_on_while_a_scheduler_has_not_answered_yet(
    tmp_path: Path, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = registered(Root(tmp_path / "runs"), study_fields)
    array = Array(
        name="ssmscale-0123456789ab",
        shape=Shape(nodes=1, ranks=1, threads=1, memory_gib=1),
        tasks=(Task(series_id="0" * 16, run_dirs=(tmp_path / "runs" / "runs" / "a",)),),
        process={},
        t=0.0,
        job_id="7",
    )
    ArrayStore(resolved.root.study("tiny")).write(array)
    squeue = write_program(tmp_path / "bin" / "squeue", "echo slurmctld is away >&2; exit 1")
    monkeypatch.setenv("PATH", str(squeue.parent))
    monkeypatch.setattr(status_verb, "WATCH_SECONDS", 0.0)
    unanswered = StudyMonitor(resolved).read()
    assert "slurmctld is away" in str(unanswered.problem)
    squeue.write_text("#!/bin/sh\n")
    answered = StudyMonitor(resolved).read()
    assert (answered.problem, answered.is_live) == (None, False)
    coming, text = iter([unanswered, unanswered, answered]), io.StringIO()
    assert watch_status(Console(file=text, width=200, markup=False), lambda: next(coming)) is answered
    assert text.getvalue().count("slurmctld is away") == 1


def test_control_characters_in_a_reason_are_not_printed(snapshot: StudySnapshot) -> None:
    first, *rest = snapshot.rows
    unruly = dataclasses.replace(first, reason="its log ends: \x1b[2J\nKilled")
    lines = printed(dataclasses.replace(snapshot, rows=[unruly, *rest]))
    (line,) = (line for line in lines if first.run_id in line)
    assert line.endswith("its log ends:  [2J Killed")


def test_an_emoji_code_in_a_log_is_printed_as_it_is() -> None:
    for stream in (console, errors):
        assert stream.render_str(":warning: low memory").plain == ":warning: low memory"
