"""One trunk serves all lengths of a Run: it saves steps and changes no result."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from filelock import FileLock

from harness.record import checkpoints
from harness.record.journal import Event, Journal, read_progress
from harness.record.kinds import Kind
from harness.record.root import Root
from harness.study.run import Run
from harness.submit.cancel import reset_attempts
from harness.train.engine import Engine
from harness.train.loop import SeriesTrainer
from tests.harness.journals import read_events, rows_of
from tests.harness.trainer import (
    StopAfter,
    losses,
    prepared,
    progress_of,
    series_folder,
    spoiling,
    train,
    trunk_steps,
    undisturbed,
)
from tests.studies import Fields, with_iterations


def cancel(root: Root, *runs: Run) -> None:
    root.control("tiny").append("cancelled", runs=[run.run_id for run in runs])


def test_a_run_on_a_shared_trunk_ends_where_it_ends_alone(here: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 5, 10, 20)
    assert train(here, fields) == ["finished"]
    assert losses(here, fields)[-1:] == undisturbed(with_iterations(study_fields, 20))


def test_training_learns(here: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 10, 40)
    train(here, fields)
    short, long = losses(here, fields)
    assert long < short < 4.2  # a uniform guess has ln 65 = 4.17


@pytest.mark.parametrize(
    ("before", "trained"),
    [
        pytest.param((5, 10), range(9, 17), id="a longer one"),  # from the branch point of 10 to that of 20
        pytest.param((5, 20), range(5, 9), id="one in between"),  # from the branch point of 5 to that of 10
    ],
)
def test_a_length_added_later_starts_from_the_newest_branch_point_before_it(
    here: Root,
    study_fields: Fields,
    before: tuple[int, ...],
    trained: range,
) -> None:
    train(here, with_iterations(study_fields, *before))
    fields = with_iterations(study_fields, 5, 10, 20)
    train(here, fields)
    assert trunk_steps(here) == list(trained)
    assert losses(here, fields) == undisturbed(fields)


def test_a_finished_study_does_nothing(here: Root, study_fields: Fields) -> None:
    train(here, study_fields)
    before = [progress.attempt for progress in progress_of(here, study_fields)]
    assert train(here, study_fields) == ["finished"]
    assert [progress.attempt for progress in progress_of(here, study_fields)] == before
    assert read_progress(series_folder(here)).attempt == 1


@pytest.mark.parametrize("asked", [1, 3, 6, 9, 12, 14])
def test_a_run_preempted_anywhere_ends_as_if_it_were_not(
    here: Root, study_fields: Fields, asked: int
) -> None:
    study_fields["model"]["dropout"] = 0.3
    fields = with_iterations(study_fields, 10, 15)
    assert train(here, fields, StopAfter(asked)) == ["preempted"]
    assert train(here, fields) == ["finished"]
    assert losses(here, fields) == undisturbed(fields)


@pytest.mark.verify
def test_a_run_preempted_twice_at_every_pair_of_steps_ends_as_if_it_were_not(
    tmp_path: Path, study_fields: Fields
) -> None:
    fields = with_iterations(study_fields, 6, 10)
    for first in range(1, 11):
        for second in range(1, 5):
            root = Root(tmp_path / f"{first}-{second}")
            outcomes = [*train(root, fields, StopAfter(first)), *train(root, fields, StopAfter(second))]
            if outcomes[-1] != "finished":
                train(root, fields)
            assert losses(root, fields) == undisturbed(fields), (first, second)


def test_a_stop_right_after_resuming_keeps_the_branch_point_it_resumed_from(
    here: Root, study_fields: Fields
) -> None:
    train(here, study_fields, StopAfter(4))  # in the branch of 5
    train(here, study_fields, StopAfter(0))
    train(here, study_fields)
    markers = [held.marker for held in checkpoints.marked(series_folder(here) / "checkpoints")]
    assert [(marker.step, marker.branch) for marker in markers] == [(4, True), (8, True)]


class Overtaken(StopAfter):
    """Never stops; after a number of checks, a newer attempt on the trunk appears."""

    def __init__(self, root: Root, asked: int) -> None:
        super().__init__(asked)
        self._root = root

    @property  # type: ignore[override]
    def reason(self) -> str | None:
        self._left -= 1
        if self._left == 0:
            Journal.open(series_folder(self._root)).close()
        return None

    @reason.setter
    def reason(self, value: str | None) -> None:
        assert value is None


def test_a_newer_attempt_takes_over_and_the_older_one_leaves(here: Root, study_fields: Fields) -> None:
    assert train(here, study_fields, Overtaken(here, 3)) == ["busy"]
    events = [event["event"] for event in read_events(series_folder(here)) if event["attempt"] == 1]
    assert "finished" not in events


def test_a_newer_attempt_on_the_trunk_fences_an_older_one_on_a_branch(
    here: Root, study_fields: Fields
) -> None:
    fields = with_iterations(study_fields, 10)
    assert train(here, fields, Overtaken(here, 10)) == ["busy"]  # at the second step of the branch
    (progress,) = progress_of(here, fields)
    assert (progress.attempt, progress.state) == (1, Event.STARTED)


def test_cancelled_runs_stay_cancelled_when_their_trunk_diverges(here: Root, study_fields: Fields) -> None:
    study_fields["training"]["optimiser"] = {"lr": 1e5, "grad_clip": None}
    ((_, runs),) = prepared(here, study_fields)
    cancel(here, runs[1])
    train(here, study_fields)
    assert [progress.state for progress in progress_of(here, study_fields)] == [Event.FAILED, None]


def test_a_checkpoint_without_its_marker_is_not_resumed_from(here: Root, study_fields: Fields) -> None:
    train(here, study_fields)
    for marker in (series_folder(here) / "checkpoints").glob("*.complete"):
        marker.unlink()
    train(here, with_iterations(study_fields, 20))
    assert trunk_steps(here)[0] == 1


@pytest.mark.parametrize(
    ("lr", "launch", "reason"),
    [
        pytest.param(1e5, {}, "training loss is", id="at a logged step"),
        pytest.param(1e30, {"log_every": 100}, "gradient norm is nan after 2 steps", id="between two"),
    ],
)
def test_a_diverged_series_fails_with_its_reason(
    here: Root, study_fields: Fields, lr: float, launch: dict[str, int], reason: str
) -> None:
    study_fields["training"]["optimiser"] = {"lr": lr, "grad_clip": None}
    assert train(here, study_fields, **launch) == ["failed"]
    for progress in progress_of(here, study_fields):
        assert progress.state == Event.FAILED
        assert progress.result is not None
        assert progress.result["kind"] == "diverged"
        assert reason in progress.result["reason"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("place", [0, -1], ids=["weight", "moment"])
def test_a_value_that_is_not_finite_is_never_saved_and_a_retry_goes_on_from_the_last_checkpoint(
    here: Root, study_fields: Fields, monkeypatch: pytest.MonkeyPatch, stage: int, place: int
) -> None:
    fields, launch = with_iterations(study_fields, 15), {"checkpoint_every": 3, "zero_stage": stage}
    with monkeypatch.context() as faulty:
        faulty.setattr(Engine, "step", spoiling(9, place))
        assert train(here, fields, log_every=20, **launch) == ["failed"]
    (failed,) = progress_of(here, fields)
    assert failed.kind is Kind.DIVERGED
    assert "not finite after 9 steps; `ssmscale retry` goes on from step 6" in str(failed.result)
    held = checkpoints.marked(series_folder(here) / "checkpoints")
    assert [found.marker.step for found in held] == [6]
    reset_attempts(here, "tiny", rows_of(here, fields))
    assert train(here, fields, **launch) == ["finished"]
    assert trunk_steps(here)[0] == 7
    assert losses(here, fields) == undisturbed(fields, zero_stage=stage)


def test_a_checkpoint_of_a_former_version_that_is_not_finite_is_passed_over(
    here: Root, study_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, launch = with_iterations(study_fields, 15), {"checkpoint_every": 3, "keep_last": 2}
    with monkeypatch.context() as former:
        former.setattr(Engine, "step", spoiling(9, 0))
        former.setattr(SeriesTrainer, "_check_state", lambda self: None)
        assert train(here, fields, **launch) == ["failed"]
    reset_attempts(here, "tiny", rows_of(here, fields))
    assert train(here, fields, **launch) == ["finished"]
    assert trunk_steps(here)[0] == 7
    assert losses(here, fields) == undisturbed(fields)
    (warning,) = [event for event in read_events(series_folder(here)) if event["event"] == Event.WARNING]
    assert "step-000000009: holds a weight or a moment that is not finite" in warning["text"]


def test_a_cancelled_run_is_skipped_and_the_others_of_its_trunk_finish(
    here: Root, study_fields: Fields
) -> None:
    ((_, runs),) = prepared(here, study_fields)
    cancel(here, runs[0])
    train(here, study_fields)
    assert [progress.state for progress in progress_of(here, study_fields)] == [None, Event.FINISHED]


def test_a_series_that_was_cancelled_while_it_waited_does_not_start(here: Root, study_fields: Fields) -> None:
    ((_, runs),) = prepared(here, study_fields)
    cancel(here, *runs)
    assert train(here, study_fields) == ["finished"]
    assert read_progress(series_folder(here)).attempt == 0


def test_a_series_that_another_process_trains_is_busy(here: Root, study_fields: Fields) -> None:
    prepared(here, study_fields)
    outcome: list[str] = []
    with FileLock(series_folder(here) / "lock"):
        thread = threading.Thread(target=lambda: outcome.extend(train(here, study_fields)))
        thread.start()
        thread.join()
    assert outcome == ["busy"]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_without_a_stable_phase_every_run_trains_alone(
    here: Root, study_fields: Fields, schedule: str
) -> None:
    study_fields["training"]["schedule"] |= {"kind": schedule}
    assert train(here, study_fields) == ["finished", "finished"]
    assert len(list((here.path / "series").iterdir())) == 2
    for progress in progress_of(here, study_fields):
        assert progress.result is not None
        assert progress.result["annealed"] is (schedule == "cosine")


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_the_micro_batch_changes_rounding_and_nothing_else(
    here: Root, study_fields: Fields, micro_batch: int
) -> None:
    fields = with_iterations(study_fields, 20)
    train(here, fields, micro_batch=micro_batch)
    assert losses(here, fields) == pytest.approx(undisturbed(fields), abs=1e-4)


def test_bf16_autocast_trains_with_fp32_parameters(here: Root, study_fields: Fields) -> None:
    from safetensors.torch import load_file

    study_fields["training"]["precision"] = "bf16"
    fields = with_iterations(study_fields, 20)
    train(here, fields)
    (weights,) = here.path.glob("runs/*/checkpoints/model.safetensors")
    assert {str(value.dtype) for value in load_file(weights).values()} == {"torch.float32"}
    assert losses(here, fields)[0] < 4.2


def test_a_finished_run_reports_its_result(there: Path, study_fields: Fields) -> None:
    result = progress_of(Root(there), study_fields)[1].result
    assert result is not None
    assert result["step"] == 10
    assert result["loss"] == pytest.approx(sum(result["loss_codebooks"]) / 2)
    full = 10 * 8 * 50 * 2
    assert 0.8 * full < result["tokens"] < full
    assert result["tokens"] % 2 == 0
    assert result["flops"] / result["tokens"] > 6 * result["n_params_non_embedding"] / 2 * 0.9
