"""One trunk for all lengths of a Run: what it saves, and that it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.record import checkpoints
from harness.record.control import Control
from harness.record.journal import Event, Journal, read_progress
from harness.record.root import Root
from tests.harness.journals import read_events
from tests.harness.trainer import StopAfter, losses, prepared, progress_of, series_folder, train, trunk_steps

Fields = dict[str, Any]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "runs")


def with_iterations(fields: Fields, *iterations: int) -> Fields:
    changed = copy.deepcopy(fields)
    changed["grid"]["iterations"] = list(iterations)
    return changed


@pytest.fixture
def undisturbed(tmp_path: Path, study_fields: Fields) -> Callable[..., list[float]]:
    """Losses of a study trained in one go, elsewhere."""

    def train_apart(fields: Fields, **launch: Any) -> list[float]:
        apart = Root(tmp_path / "apart")
        train(apart, fields, **launch)
        return losses(apart, fields)

    return train_apart


def test_a_run_on_a_shared_trunk_ends_where_it_ends_alone(
    root: Root, study_fields: Fields, undisturbed: Callable[..., list[float]]
) -> None:
    assert train(root, with_iterations(study_fields, 5, 10, 20)) == ["finished"]
    shared = losses(root, with_iterations(study_fields, 5, 10, 20))
    assert shared[-1] == undisturbed(with_iterations(study_fields, 20))[0]


def test_training_learns(root: Root, study_fields: Fields) -> None:
    fields = with_iterations(study_fields, 10, 40)
    train(root, fields)
    short, long = losses(root, fields)
    assert long < short < 4.2  # ln 65 = 4.17 knows nothing


def test_extending_iterations_reuses_the_trunk(
    root: Root, study_fields: Fields, undisturbed: Callable[..., list[float]]
) -> None:
    train(root, with_iterations(study_fields, 5, 10))
    before = losses(root, with_iterations(study_fields, 5, 10))
    train(root, with_iterations(study_fields, 5, 10, 20))
    assert trunk_steps(root) == list(range(9, 17))  # from the branch point of 10 to that of 20
    after = losses(root, with_iterations(study_fields, 5, 10, 20))
    assert after[:2] == before
    assert after == undisturbed(with_iterations(study_fields, 5, 10, 20))


def test_a_length_inserted_later_starts_from_the_newest_checkpoint_before_it(
    root: Root, study_fields: Fields, undisturbed: Callable[..., list[float]]
) -> None:
    train(root, with_iterations(study_fields, 5, 20))
    train(root, with_iterations(study_fields, 5, 10, 20))
    assert trunk_steps(root) == list(range(5, 9))  # from the branch point of 5 to that of 10
    assert losses(root, with_iterations(study_fields, 5, 10, 20)) == undisturbed(
        with_iterations(study_fields, 5, 10, 20)
    )


def test_a_finished_study_does_nothing(root: Root, study_fields: Fields) -> None:
    train(root, study_fields)
    before = [progress.attempt for progress in progress_of(root, study_fields)]
    assert train(root, study_fields) == ["finished"]
    assert [progress.attempt for progress in progress_of(root, study_fields)] == before
    assert read_progress(series_folder(root)).attempt == 1


@pytest.mark.parametrize("asked", [1, 3, 6, 9, 12, 14])
def test_a_run_preempted_anywhere_ends_as_if_it_were_not(
    root: Root, study_fields: Fields, undisturbed: Callable[..., list[float]], asked: int
) -> None:
    fields = with_iterations(study_fields, 10, 15)
    assert train(root, fields, StopAfter(asked)) == ["preempted"]
    assert train(root, fields) == ["finished"]
    assert losses(root, fields) == undisturbed(fields)


@pytest.mark.verify
def test_a_run_preempted_twice_at_every_pair_of_steps_ends_as_if_it_were_not(
    tmp_path: Path, study_fields: Fields, undisturbed: Callable[..., list[float]]
) -> None:
    fields = with_iterations(study_fields, 6, 10)
    expected = undisturbed(fields)
    for first in range(1, 11):
        for second in range(1, 5):
            root = Root(tmp_path / f"{first}-{second}")
            outcomes = [*train(root, fields, StopAfter(first)), *train(root, fields, StopAfter(second))]
            if outcomes[-1] != "finished":
                train(root, fields)
            assert losses(root, fields) == expected, (first, second)


def test_a_stop_right_after_resuming_keeps_the_branch_point_it_resumed_from(
    root: Root, study_fields: Fields
) -> None:
    fields = with_iterations(study_fields, 5, 10)
    train(root, fields, StopAfter(4))  # in the branch of 5
    train(root, fields, StopAfter(0))
    train(root, fields)
    steps = [
        (held.marker.step, held.marker.branch)
        for held in checkpoints.marked(series_folder(root) / "checkpoints")
    ]
    assert steps == [(4, True), (8, True)]


class Overtaken(StopAfter):
    """Never stops; when it has been asked so many times, a newer attempt on the trunk appears."""

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


def test_a_newer_attempt_takes_over_and_the_older_one_leaves(root: Root, study_fields: Fields) -> None:
    assert train(root, study_fields, Overtaken(root, 3)) == ["busy"]
    events = [event["event"] for event in read_events(series_folder(root)) if event["attempt"] == 1]
    assert "finished" not in events


def test_a_newer_attempt_on_the_trunk_fences_who_is_on_a_branch(root: Root, study_fields: Fields) -> None:
    study_fields["grid"]["iterations"] = [10]
    assert train(root, study_fields, Overtaken(root, 10)) == ["busy"]  # at the second step of the branch
    (progress,) = progress_of(root, study_fields)
    assert progress.attempt == 1
    assert progress.state != Event.FINISHED


def test_cancelled_runs_stay_cancelled_when_their_trunk_diverges(root: Root, study_fields: Fields) -> None:
    study_fields["training"]["optimiser"] = {"lr": 1e5, "grad_clip": None}
    ((_, runs),) = prepared(root, study_fields)
    Control(root.study("tiny") / "control.jsonl").append("cancelled", runs=[runs[1].run_id])
    train(root, study_fields)
    assert [progress.state for progress in progress_of(root, study_fields)] == [Event.FAILED, None]


def test_dropout_and_caption_dropout_do_not_depend_on_interruptions(
    root: Root, study_fields: Fields, undisturbed: Callable[..., list[float]]
) -> None:
    study_fields["model"]["dropout"] = 0.3
    fields = with_iterations(study_fields, 10)
    assert train(root, fields, StopAfter(5)) == ["preempted"]
    train(root, fields)
    assert losses(root, fields) == undisturbed(fields)


def test_a_damaged_checkpoint_is_passed_over_and_reported(
    root: Root, study_fields: Fields, undisturbed: Callable[..., list[float]]
) -> None:
    train(root, with_iterations(study_fields, 5, 10))
    newest = checkpoints.marked(series_folder(root) / "checkpoints")[-1]
    file = newest.folder / newest.tag / next(iter(newest.marker.files))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    fields = with_iterations(study_fields, 5, 10, 20)
    train(root, fields)
    journal = series_folder(root) / "journal" / "0002.jsonl"
    assert file.name in journal.read_text()
    assert trunk_steps(root)[0] == 5  # from the good one before it
    assert losses(root, fields) == undisturbed(fields)


def test_a_checkpoint_without_its_marker_is_not_resumed_from(root: Root, study_fields: Fields) -> None:
    train(root, with_iterations(study_fields, 5, 10))
    for marker in (series_folder(root) / "checkpoints").glob("*.complete"):
        marker.unlink()
    train(root, with_iterations(study_fields, 5, 10, 20))
    assert trunk_steps(root)[0] == 1


def test_a_checkpoint_with_a_crafted_pickle_is_refused(
    root: Root, study_fields: Fields, tmp_path: Path
) -> None:
    import hashlib
    import json
    import os
    import pickle

    class Crafted:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    train(root, with_iterations(study_fields, 5, 10))
    newest = checkpoints.marked(series_folder(root) / "checkpoints")[-1]
    name = next(iter(newest.marker.files))
    content = pickle.dumps(Crafted())
    (newest.folder / newest.tag / name).write_bytes(content)
    marker = newest.folder / f"{newest.tag}.complete"
    fields = json.loads(marker.read_text())
    fields["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    marker.write_text(json.dumps(fields))
    train(root, with_iterations(study_fields, 5, 10, 20))
    assert not (tmp_path / "executed").exists()
    assert "passed over" in (series_folder(root) / "journal" / "0002.jsonl").read_text()


def test_a_diverged_series_fails_with_its_reason(root: Root, study_fields: Fields) -> None:
    study_fields["training"]["optimiser"] = {"lr": 1e5, "grad_clip": None}
    assert train(root, study_fields) == ["failed"]
    for progress in progress_of(root, study_fields):
        assert progress.state == Event.FAILED
        assert progress.result is not None
        assert "loss is" in progress.result["reason"]


def test_a_trunk_that_diverged_since_its_last_logged_step_is_told_by_its_evaluation(
    root: Root, study_fields: Fields
) -> None:
    study_fields["training"]["optimiser"] = {"lr": 1e30, "grad_clip": None}
    fields = with_iterations(study_fields, 20)
    assert train(root, fields, log_every=100, eval_every=3) == ["failed"]
    (progress,) = progress_of(root, fields)
    assert progress.result is not None
    assert (progress.result["kind"], "held-out loss is nan" in progress.result["reason"]) == (
        "diverged",
        True,
    )


def test_a_cancelled_run_is_skipped_and_the_others_of_its_trunk_finish(
    root: Root, study_fields: Fields
) -> None:
    fields = with_iterations(study_fields, 5, 10)
    ((_, runs),) = prepared(root, fields)
    Control(root.study("tiny") / "control.jsonl").append("cancelled", runs=[runs[0].run_id])
    train(root, fields)
    states = [progress.state for progress in progress_of(root, fields)]
    assert states == [None, Event.FINISHED]


def test_a_series_that_was_cancelled_while_it_waited_is_not_begun(root: Root, study_fields: Fields) -> None:
    ((_, runs),) = prepared(root, study_fields)
    Control(root.study("tiny") / "control.jsonl").append("cancelled", runs=[run.run_id for run in runs])
    assert train(root, study_fields) == ["finished"]
    assert read_progress(series_folder(root)).attempt == 0


def test_a_series_another_process_trains_is_left_alone(root: Root, study_fields: Fields) -> None:
    from filelock import FileLock

    prepared(root, study_fields)
    with FileLock(series_folder(root) / "lock"):
        import threading

        outcome: list[str] = []
        thread = threading.Thread(target=lambda: outcome.extend(train(root, study_fields)))
        thread.start()
        thread.join()
    assert outcome == ["busy"]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_without_a_stable_phase_every_run_trains_alone(
    root: Root, study_fields: Fields, schedule: str
) -> None:
    study_fields["training"]["schedule"] |= {"kind": schedule}
    assert train(root, study_fields) == ["finished", "finished"]
    assert len(list((root.path / "series").iterdir())) == 2
    for progress in progress_of(root, study_fields):
        assert progress.result is not None
        assert progress.result["annealed"] is (schedule == "cosine")


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_the_micro_batch_changes_rounding_and_nothing_else(
    root: Root, study_fields: Fields, undisturbed: Callable[..., list[float]], micro_batch: int
) -> None:
    fields = with_iterations(study_fields, 20)
    train(root, fields, micro_batch=micro_batch)
    assert losses(root, fields) == pytest.approx(undisturbed(fields), abs=1e-4)


def test_bf16_autocast_trains_with_fp32_parameters(root: Root, study_fields: Fields) -> None:
    from safetensors.torch import load_file

    study_fields["training"]["precision"] = "bf16"
    fields = with_iterations(study_fields, 20)
    train(root, fields)
    (weights,) = root.path.glob("runs/*/checkpoints/model.safetensors")
    assert {str(value.dtype) for value in load_file(weights).values()} == {"torch.float32"}
    assert losses(root, fields)[0] < 4.2


def test_what_a_finished_run_says_of_itself(root: Root, study_fields: Fields) -> None:
    from ssmttm.corpus.dataset import TokenDataset

    train(root, study_fields)
    result = progress_of(root, study_fields)[1].result
    assert result is not None
    assert result["step"] == 10
    assert result["loss"] == pytest.approx(sum(result["loss_codebooks"]) / 2)
    full = 10 * 8 * 50 * 2
    data = TokenDataset(Path(study_fields["corpus"]["path"]), "train")
    assert 0.8 * full < result["tokens"] < full
    assert result["tokens"] % 2 == 0
    assert result["flops"] / result["tokens"] > 6 * result["n_params_non_embedding"] / 2 * 0.9
    assert len(data) == 48
