"""The journal: what it says survives torn lines, several attempts and a process thought dead."""

from pathlib import Path

import pytest

from harness.journal import Control, Event, Fenced, Journal, attempts, identify_process, read_progress


def test_state_is_the_last_event_that_changed_it(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(Event.STARTED, **identify_process())
        journal.append(Event.STEP, step=5, loss=3.0)
    progress = read_progress(tmp_path)
    assert (progress.state, progress.step, progress.is_alive) == (Event.STARTED, 5, True)


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(Event.STARTED)
        journal.append(Event.STEP, step=5, loss=3.0)
    with journal.path.open("a") as file:
        file.write('{"t": 1, "event": "step", "step": 10, "lo')
    assert read_progress(tmp_path).step == 5


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', '{"step": 7}', "\x00\x00", "{}", '{"event": 5}'])
def test_lines_that_are_no_events_are_passed_over(tmp_path: Path, line: str) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(Event.STEP, step=5, loss=3.0)
    with journal.path.open("a") as file:
        file.write(line + "\n")
    assert read_progress(tmp_path).step == 5


def test_every_attempt_has_a_file_of_its_own(tmp_path: Path) -> None:
    first, second = Journal.open(tmp_path), Journal.open(tmp_path)
    assert (first.attempt, second.attempt) == (1, 2)
    assert attempts(tmp_path) == [1, 2]
    with pytest.raises(FileExistsError):
        Journal(first.path, 1)


def test_a_newer_attempt_fences_the_older_one(tmp_path: Path) -> None:
    old = Journal.open(tmp_path)
    Journal.open(tmp_path)
    with pytest.raises(Fenced):
        old.append(Event.STEP, step=1)
    assert read_progress(tmp_path).step == 0


def test_a_step_two_attempts_saw_counts_once_by_the_later_word(tmp_path: Path) -> None:
    for loss in (3.0, 2.5):
        with Journal.open(tmp_path) as journal:
            journal.append(Event.STEP, step=5, loss=loss)
    assert [event["loss"] for event in read_progress(tmp_path).steps.values()] == [2.5]


def test_a_process_that_is_gone_is_not_alive(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.append(Event.STARTED, **{**identify_process(), "process_started": 1.0})
    assert not read_progress(tmp_path).is_alive


def test_values_that_are_not_json_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        with pytest.raises(ValueError, match="JSON"):
            journal.append(Event.STEP, step=1, loss=float("nan"))
        assert journal.path.stat().st_size == 0


def test_a_retry_forgets_cancellations_and_the_failures_so_far(tmp_path: Path) -> None:
    control = Control(tmp_path / "control.jsonl")
    control.append("cancelled", runs=["a", "b"])
    control.append("retried", runs=["a"], attempts={"a": 2})
    assert control.cancelled() == {"b"}
    assert control.forgiven() == {"a": 2}
