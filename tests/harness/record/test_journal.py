"""The journal stays readable after torn lines, several attempts and a process thought dead."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.common.disk import DiskFull
from harness.common.jsonl import CHUNK
from harness.common.process import identify_process, process_is_alive
from harness.record.control import Control, attempts_reset_in
from harness.record.journal import (
    MOST_NOTES,
    Event,
    Fenced,
    Journal,
    ProgressReader,
    attempt_file,
    attempts,
    read_progress,
)
from harness.record.kinds import Kind
from tests.harness.conftest import SAY_WHO
from tests.harness.journals import read_events


def write_step_5_and(tmp_path: Path, more: bytes) -> Path:
    """Write a journal of one step and these bytes."""
    with Journal.open(tmp_path) as journal:
        journal.append(Event.STEP, step=5, loss=3.0)
    with journal.path.open("ab") as file:
        file.write(more)
    return journal.path


def test_state_is_the_last_event_that_changed_it(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(Event.STARTED, **identify_process())
        journal.append(Event.STEP, step=5, loss=3.0)
    progress = read_progress(tmp_path)
    assert (progress.state, progress.step, progress.is_alive) == (Event.STARTED, 5, True)


TORN = '{"t": 1, "event": "step", "step": 10, "lo'
NO_EVENTS = ("[1, 2]", '"text"', '{"step": 7}', "\x00\x00", "{}", '{"event": 5}')


@pytest.mark.parametrize("more", [TORN, *(f"{line}\n" for line in NO_EVENTS)])
def test_a_torn_last_line_and_lines_that_are_not_events_are_skipped(tmp_path: Path, more: str) -> None:
    write_step_5_and(tmp_path, more.encode())
    assert read_progress(tmp_path).step == 5


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ({"event": "preempted", "reason": "SIGUSR2"}, Kind.TIME_LIMIT),
        ({"event": "preempted", "reason": "SIGTERM"}, Kind.SIGNAL),
        ({"event": "preempted", "reason": "SIGINT"}, Kind.SIGNAL),
        ({"event": "preempted", "reason": "another rank's signal"}, Kind.SIGNAL),
        ({"event": "preempted", "reason": "out of memory"}, Kind.OUT_OF_MEMORY),
        ({"event": "preempted", "reason": "out of memory with micro-batch 4 on rank 1"}, Kind.OUT_OF_MEMORY),
        ({"event": "preempted", "reason": "/disk: no space left"}, Kind.DISK_FULL),
        ({"event": "preempted", "reason": "/disk: no space left", "kind": "unheard-of"}, Kind.DISK_FULL),
        ({"event": "preempted", "reason": "SIGTERM", "kind": "out_of_memory"}, Kind.OUT_OF_MEMORY),
        ({"event": "failed", "reason": "SIGUSR2"}, Kind.ERROR),
        ({"event": "failed", "reason": "its loss is not a number", "kind": "diverged"}, Kind.DIVERGED),
        ({"event": "cancelled"}, None),
        ({"event": "finished"}, None),
    ],
)
def test_an_event_has_its_kind_and_in_old_journals_that_of_its_reason_until_the_next_attempt(
    tmp_path: Path, line: dict[str, Any], kind: Kind | None
) -> None:
    series = tmp_path / "series" / "s"
    with write_step_5_and(series, b"").open("a") as file:
        file.write(json.dumps({"t": 1.0, **line}) + "\n")
    assert read_progress(series).kind is kind
    with Journal.open(series) as journal:
        journal.append(Event.RESUMED)
    assert read_progress(series).kind is None


def test_every_attempt_has_its_own_file_and_fences_the_older_ones(tmp_path: Path) -> None:
    first, second = Journal.open(tmp_path), Journal.open(tmp_path)
    assert (first.attempt, second.attempt) == (1, 2)
    assert attempts(tmp_path) == [1, 2]
    with pytest.raises(FileExistsError):
        Journal(first.path, 1)
    with pytest.raises(Fenced):
        first.append(Event.STEP, step=1)
    assert read_progress(tmp_path).step == 0


def test_of_a_step_in_two_attempts_the_later_one_counts(tmp_path: Path) -> None:
    for loss in (3.0, 2.5):
        with Journal.open(tmp_path) as journal:
            journal.append(Event.STEP, step=5, loss=loss)
    assert [event["loss"] for event in read_progress(tmp_path).steps.values()] == [2.5]


ME = identify_process()
BY_BIRTH = {key: ME[key] for key in ("host", "pid")}


@pytest.mark.parametrize(
    ("process", "alive"),
    [
        (ME | {"started_ticks": 1}, False),
        (ME | {"boot_id": "another"}, False),
        (BY_BIRTH | {"process_started": psutil.Process().create_time()}, True),
        (BY_BIRTH | {"process_started": 1.0}, False),
    ],
    ids=["gone", "before a restart", "by its birth", "another birth"],
)
def test_a_journalled_process_is_known_by_when_it_started(
    tmp_path: Path, process: dict[str, Any], alive: bool
) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(Event.STARTED, **process)
    assert read_progress(tmp_path).is_alive is alive


def test_a_zombie_process_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", SAY_WHO], stdout=subprocess.PIPE)
    assert child.stdout is not None
    identity = json.loads(child.stdout.read())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process_is_alive(identity)
    child.communicate()


def test_values_that_are_not_json_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        with pytest.raises(ValueError, match="JSON"):
            journal.append(Event.STEP, step=1, loss=float("nan"))
        assert journal.path.stat().st_size == 0


STEP = {"t": 1, "event": "step", "step": 10, "loss": 1.5}
COUNTS = [f"n_params{part}" for part in ("", "_non_embedding", "_text_encoder", "_null_condition")]
MEASURED = {"loss": 2.0, "loss_codebooks": [2.0], "step": 10, "tokens": 100, "flops": 1e6, "annealed": True}
RESULT: dict[str, Any] = MEASURED | dict.fromkeys(COUNTS, 10)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"step": -1}, "step"),
        ({"step": True}, "step"),
        ({"step": "7"}, "step"),
        ({"step": 2**63}, "step"),
        ({"step": 10**5000}, "JSON"),
        ({"step": None}, "step"),
        ({"loss": float("nan")}, "loss"),
        ({"loss": float("inf")}, "loss"),
        ({"loss": False}, "loss"),
        ({"t": -1}, "t"),
        ({"t": 1e300}, "t"),
        ({"tokens_per_second": "fast"}, "tokens_per_second"),
        ({"layout": {"ranks": "two"}}, "layout.ranks"),
        ({"gpu_share": 0.0}, "gpu_share"),
        ({"loss_codebooks": [1, None]}, "loss_codebooks.1"),
    ],
)
def test_a_line_with_a_wrong_value_is_named_and_skipped(
    tmp_path: Path, changed: dict[str, Any], why: str
) -> None:
    sys.set_int_max_str_digits(0)
    lines = json.dumps({**STEP, **changed}) + "\n" + json.dumps({**STEP, "step": 6}) + "\n"
    path = write_step_5_and(tmp_path, lines.encode())
    progress = read_progress(tmp_path)
    assert list(progress.steps) == [5, 6]
    (note,) = progress.damaged
    assert note.startswith(f"{path} line 2: ")
    assert why in note


def test_a_finished_run_without_a_whole_result_is_not_finished(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    for fields in ({}, {**RESULT, "n_params": None}, {**RESULT, "loss_codebooks": "2"}, {"loss": 1.0}):
        with Journal.open(folder) as journal:
            journal.append(Event.STARTED)
            journal.append(Event.FINISHED, **fields)
        assert (read_progress(folder).state, read_progress(folder).result) == (Event.STARTED, None)
    with Journal.open(folder) as journal:
        journal.append(Event.FINISHED, **RESULT)
    assert read_progress(folder).state == Event.FINISHED
    with Journal.open(tmp_path / "series" / "a") as trunk:
        trunk.append(Event.FINISHED)
    assert read_progress(tmp_path / "series" / "a").state == Event.FINISHED


def test_files_that_are_not_attempts_neither_count_nor_stop_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    (folder / "0001.jsonl").mkdir(parents=True)
    for name in ("99999999999999999999.jsonl", "²³.jsonl", "00002.jsonl", "0002.jsonl.bak", "-001.jsonl"):
        (folder / name).write_text(json.dumps(STEP) + "\n")
    assert read_progress(tmp_path).steps == {}
    with Journal.open(tmp_path) as journal:
        journal.append(Event.STEP, step=5, loss=3.0)
    assert (journal.attempt, list(read_progress(tmp_path).steps)) == (2, [5])


@pytest.mark.parametrize(("before", "length"), [(0, CHUNK), (CHUNK // 2, CHUNK), (0, 3 * CHUNK)])
def test_lines_that_are_too_long_are_skipped_at_any_position_and_many_are_counted(
    tmp_path: Path, before: int, length: int
) -> None:
    sizes = {6: before, 7: length}
    lines = [json.dumps({**STEP, "step": step, "text": "x" * size}) for step, size in sizes.items()]
    lines += [""] * (2 * MOST_NOTES) + [json.dumps(STEP), ""]
    write_step_5_and(tmp_path, "\n".join(lines).encode())
    progress = read_progress(tmp_path)
    assert list(progress.steps) == [5, 6, 10]
    assert len(progress.damaged) == MOST_NOTES + 1
    assert f"{MOST_NOTES + 1} more lines" in progress.damaged[-1]


ENDS = st.sampled_from([b"\n", b"", b"\r\n"])
WORDS = st.sampled_from([*b'{ } "step" : NaN -1 \xff \x00 true , "t"'.split(), b"[" * 300, b"9" * 400])
OBJECTS = st.dictionaries(
    st.sampled_from(["t", "event", "step", "loss", "layout", "runs", "attempts", "process", "pid"]),
    st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(Event)
        ),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)
LINES = st.one_of(
    st.binary(max_size=40),
    st.lists(WORDS, max_size=8).map(b"".join),
    OBJECTS.map(lambda fields: json.dumps(fields).encode()),
    OBJECTS.map(lambda fields: json.dumps({**STEP, **fields}).encode()),
    st.sampled_from(sorted(Event)).map(lambda kind: json.dumps({**STEP, **RESULT, "event": kind}).encode()),
)


def append_to_attempts(folder: Path, written: Iterable[tuple[int, bytes]]) -> Iterator[Path]:
    """Append bytes to a run's attempts one by one; yield the run's directory after each."""
    directory = folder / "runs" / "a"
    (directory / "journal").mkdir(parents=True)
    for attempt, content in written:
        with attempt_file(directory, attempt).open("ab") as file:
            file.write(content)
        yield directory


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(1, 3), LINES, ENDS), max_size=12))
def test_reading_on_gives_what_reading_anew_gives_for_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, bytes, bytes]]
) -> None:
    reader, contents = ProgressReader(), ((attempt, line + end) for attempt, line, end in written)
    for directory in append_to_attempts(tmp_path_factory.mktemp("any"), contents):
        progress = reader.read(directory)
        assert repr(progress) == repr(read_progress(directory))
        assert progress.is_alive in {True, False}
        assert all(isinstance(step, int) and step >= 0 for step in progress.steps)
        assert all(event["attempt"] in {1, 2, 3} for event in read_events(directory))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 2), st.sampled_from(["step", "eval"]), st.integers(0, 5)), max_size=12)
)
def test_a_reader_of_the_newest_only_holds_the_same_newest_step_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, str, int]]
) -> None:
    contents = (
        (attempt, json.dumps({"t": 1.0, "event": kind, "step": step, "loss": number}).encode() + b"\n")
        for number, (attempt, kind, step) in enumerate(written)
    )
    reader = ProgressReader(newest_only=True)
    for directory in append_to_attempts(tmp_path_factory.mktemp("any"), contents):
        brief, whole = reader.read(directory), read_progress(directory)
        assert (brief.step, brief.attempt) == (whole.step, whole.attempt)
        for few, every in ((brief.steps, whole.steps), (brief.evals, whole.evals)):
            assert few == ({max(every): every[max(every)]} if every else {})


def test_a_file_that_could_not_be_read_once_is_read_again_even_if_it_has_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Journal.open(tmp_path), Journal.open(tmp_path)
    second.append(Event.STEP, step=2, loss=3.0)
    os.write(first._descriptor, json.dumps({**STEP, "step": 1}).encode() + b"\n")
    reader, whole = ProgressReader(), Path.open

    def hesitate(path: Path, *how: Any, **more: Any) -> Any:
        if path == first.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(path, *how, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", hesitate)
        progress = reader.read(tmp_path)
        assert (list(progress.steps), len(progress.damaged)) == ([2], 1)
    progress = reader.read(tmp_path)
    assert (list(progress.steps), progress.damaged) == ([1, 2], ())


def test_an_unchanged_journal_is_not_read_again(tmp_path: Path) -> None:
    reader, journal = ProgressReader(), Journal.open(tmp_path)
    journal.append(Event.STEP, step=5, loss=3.0)
    before = reader.read(tmp_path)
    assert reader.read(tmp_path) is before
    journal.append(Event.STEP, step=6, loss=3.0)
    assert list(reader.read(tmp_path).steps) == [5, 6]
    assert list(before.steps) == [5]  # an earlier result does not grow
    journal.path.unlink()
    assert reader.read(tmp_path).steps == {}


@settings(max_examples=100)
@given(st.lists(st.tuples(LINES, ENDS), max_size=8))
def test_a_control_file_of_any_bytes_is_read_and_appended_to(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[bytes, bytes]]
) -> None:
    control = Control(tmp_path_factory.mktemp("any") / "control.jsonl")
    control.path.write_bytes(b"".join(line + end for line, end in written))
    control.append("cancelled", runs=["a"])
    assert "a" in control.cancelled()
    assert all(isinstance(attempt, int) for attempt in attempts_reset_in(control.read()).values())


@pytest.mark.parametrize("n_runs", [2, 30_000])
def test_a_retry_resets_the_cancellations_and_failures_of_any_number_of_runs(
    tmp_path: Path, n_runs: int
) -> None:
    control, runs = Control(tmp_path / "control.jsonl"), [f"{number:012x}" for number in range(n_runs)]
    control.append("cancelled", runs=[*runs, "b"])
    assert control.cancelled() == {*runs, "b"}
    control.append("retried", runs=runs, attempts=dict.fromkeys(runs, 3))
    assert control.cancelled() == {"b"}
    assert attempts_reset_in(control.read()) == dict.fromkeys(runs, 3)


def test_a_line_that_does_not_fit_on_the_disk_is_removed_whole(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64 * 1024)
    journal = Journal.open(disk / "run")
    step = 0

    def fill() -> None:
        nonlocal step
        while True:
            journal.append(Event.STEP, step=step, loss=1.0, text="x" * 1000)
            step += 1

    with pytest.raises(DiskFull, match=re.escape(str(journal.path))):
        fill()
    assert step > 10
    assert journal.path.read_bytes().endswith(b"}\n")
    assert read_progress(disk / "run").damaged == ()
    journal.append(Event.STEP, step=step, loss=1.0)  # a short line still fits
    progress = read_progress(disk / "run")
    assert (list(progress.steps), progress.damaged) == (list(range(step + 1)), ())
