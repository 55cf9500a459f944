"""Only files that its marker seals are loaded from a checkpoint, and only superfluous checkpoints are removed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.archive.prune import prune
from harness.record import checkpoints
from harness.record.checkpoints import Checkpoint, FileFacts, Marker, retire, tag_of
from harness.record.heartbeat import Heartbeat
from harness.record.journal import Event, Fenced, Journal, read_progress
from harness.record.root import Layout, Root, read_launch
from harness.train.checkpoint import Saver, load, save
from harness.train.engine import Engine
from harness.train.ranks import initialise_ranks
from ssmttm.errors import InputError
from tests.conftest import files_below, flip_a_byte
from tests.harness.fuzzing import Planted
from tests.harness.journals import read_events, registered
from tests.harness.trainer import StopAfter, losses, prepared, series_folder, train, trunk_steps, undisturbed
from tests.studies import Fields, tiny_study


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """A ROOT with branch points at 4 and 8 and an evaluation every second step; to be copied."""
    root = Root(tmp_path_factory.mktemp("trained") / "runs")
    train(root, tiny_study(tiny_corpus), checkpoint_every=2, eval_every=2, keep_last=9)
    return root.path


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Root:
    return Root(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def newest(root: Root) -> Checkpoint:
    """The trunk's newest checkpoint."""
    return checkpoints.marked(series_folder(root) / "checkpoints")[-1]


def write(checkpoint: Checkpoint, files: dict[str, bytes]) -> Checkpoint:
    """Put files into a checkpoint, listed in a marker that fits them."""
    listed = dict(checkpoint.marker.files)
    for name, content in files.items():
        (checkpoint.path / name).parent.mkdir(exist_ok=True)
        (checkpoint.path / name).write_bytes(content)
        listed[name] = FileFacts(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    marker = checkpoint.marker.sealed(files=listed)
    (checkpoint.folder / f"{checkpoint.tag}.complete").write_text(marker.model_dump_json())
    return Checkpoint(checkpoint.folder, checkpoint.tag, marker)


def problems(checkpoint: Checkpoint) -> list[str]:
    """Return the problems that training would find in a checkpoint's folder and in the checkpoint."""
    held, unusable = checkpoints.survey(checkpoint.folder)
    still = [found for found in held if found.tag == checkpoint.tag]
    return [problem.text for problem in unusable] + [
        problem.text for found in still if (problem := checkpoints.inspect(found))
    ]


def test_whole_checkpoints_have_no_problem_and_know_their_held_out_loss(root: Root) -> None:
    folder = series_folder(root) / "checkpoints"
    evals = read_progress(series_folder(root)).evals
    held = checkpoints.marked(folder)
    steps = [(found.marker.step, found.marker.branch, found.marker.loss) for found in held]
    assert steps == [(step, step in {4, 8}, evals[step]["loss"]) for step in (2, 4, 6, 8)]
    assert [problem for found in held for problem in problems(found)] == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_writes_loads_under_the_explicit_list(
    tmp_path: Path, study_fields: Fields, stage: int
) -> None:
    root = Root(tmp_path / "runs")
    study_fields["grid"]["iterations"] = [5]
    assert train(root, study_fields, StopAfter(3), zero_stage=stage) == ["preempted"]
    (found,) = checkpoints.marked(series_folder(root) / "checkpoints")
    assert (found.marker.zero_stage, checkpoints.inspect(found)) == (stage, None)
    assert train(root, study_fields, zero_stage=stage) == ["finished"]
    assert trunk_steps(root)[0] == found.marker.step + 1


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "more.pt", "more.bin", "more", "sub/more.json"]
)
def test_a_crafted_pickle_is_refused_whatever_its_file_is_called(
    newest: Checkpoint, planted: Planted, name: str
) -> None:
    (problem,) = problems(write(newest, {name: planted.pickled}))
    assert Path(name).name in problem
    planted.assert_not_executed()


def test_deepspeeds_converter_executes_nothing_crafted(
    tmp_path: Path, study_fields: Fields, planted: Planted
) -> None:
    root = Root(tmp_path / "runs")
    train(root, study_fields, StopAfter(3), zero_stage=1)
    (held,) = checkpoints.marked(series_folder(root) / "checkpoints")
    write(held, dict.fromkeys(held.marker.files, planted.pickled))
    options = [f"--input_folder={held.path}", f"--output_folder={tmp_path / 'out'}"]
    program = "from harness.train.checkpoint import convert; convert()"
    command = [sys.executable, "-c", program, *options, "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "UnpicklingError" in done.stderr
    planted.assert_not_executed()


@pytest.mark.parametrize("linked", ["checkpoints", "."])
def test_nothing_is_removed_through_a_link(newest: Checkpoint, tmp_path: Path, linked: str) -> None:
    place, elsewhere = newest.folder.parent / linked, tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.absolute().symlink_to(elsewhere)
    before = files_below(elsewhere)
    with pytest.raises(InputError, match="leads out of"):
        retire(newest.folder, newest.marker.step + 1, keep_last=1, keep_best=False)
    assert files_below(elsewhere) == before


@pytest.fixture
def engine(root: Root, study_fields: Fields) -> Engine:
    ((_, runs),) = prepared(root, study_fields)
    return Engine(runs[0], Layout(micro_batch=8), initialise_ranks(1))


@pytest.fixture
def heartbeat(tmp_path: Path) -> Iterator[Heartbeat]:
    (tmp_path / "logs").mkdir()
    with Heartbeat(tmp_path, 0) as made:
        yield made


def test_deepspeed_itself_loads_nothing_crafted(
    engine: Engine, newest: Checkpoint, planted: Planted, heartbeat: Heartbeat
) -> None:
    crafted = write(newest, {next(iter(newest.marker.files)): planted.pickled})
    with pytest.raises(pickle.UnpicklingError):
        load(engine, crafted, heartbeat)
    planted.assert_not_executed()


def test_unlisted_files_and_links_are_refused(newest: Checkpoint, tmp_path: Path) -> None:
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "sub/more", "mp_rank_01_model_states.pt"):
        stray = newest.path / name
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"")
        (problem,) = problems(newest)
        assert name in problem
        stray.unlink()
    assert problems(newest) == []
    file = newest.path / next(iter(newest.marker.files))
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert file.name in problems(newest)[0]
    file.unlink()
    (tmp_path / "elsewhere").rename(file)
    assert problems(newest) == []
    newest.path.rename(tmp_path / "tag")
    newest.path.symlink_to(tmp_path / "tag")
    assert newest.tag in problems(newest)[0]


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", ".", "", "a//b", "./a", "a\0b"]
)
def test_a_marker_that_names_files_outside_its_tag_is_refused(newest: Checkpoint, name: str) -> None:
    path = newest.folder / f"{newest.tag}.complete"
    fields = json.loads(path.read_text()) | {"seal": None}
    fields["files"][name] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(fields))
    assert newest.tag not in {held.tag for held in checkpoints.marked(newest.folder)}
    assert newest.tag in problems(newest)[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "EOF"), ("\xff", "JSON"), ("{}", "step"), ('{"from": "the future"}', "step"), (None, "step 2")],
)
def test_a_marker_that_cannot_be_read_is_reported_and_left_where_it_is(
    newest: Checkpoint, text: str | None, why: str
) -> None:
    path = newest.folder / f"{newest.tag}.complete"
    path.write_text((newest.folder / "step-000000002.complete").read_text() if text is None else text)
    before = path.read_bytes()
    (problem,) = problems(newest)
    assert str(path) in problem
    assert why in problem
    assert path.read_bytes() == before


def test_one_failed_reading_of_the_disk_costs_no_checkpoint(
    root: Root,
    study_fields: Fields,
    newest: Checkpoint,
    heartbeat: Heartbeat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, whole = newest.path / next(iter(newest.marker.files)), Path.stat

    def hesitate(path: Path, **how: Any) -> os.stat_result:
        if path == file:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return whole(path, **how)

    study_fields["grid"]["iterations"] = [5, 10, 20]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", hesitate)
        launch = read_launch(root, newest.folder.parent.name)
        saver = Saver(initialise_ranks(1), launch, heartbeat)
        found = saver.find(newest.folder, 1, newest.marker.step, None)
        assert found is not None
        assert found.marker.step < newest.marker.step
        done = prune(registered(root, study_fields))
        (kept,) = [item for item in done.kept if item.path == newest.path]
        assert "cannot be read" in kept.why
    assert checkpoints.marked(newest.folder)[-1] == newest
    assert checkpoints.inspect(newest) is None


def test_a_damaged_checkpoint_does_not_occupy_its_step(
    root: Root, study_fields: Fields, newest: Checkpoint
) -> None:
    file = newest.path / next(iter(newest.marker.files))
    flip_a_byte(file)
    assert not checkpoints.keep(newest.folder, newest.marker.step, branch=True)
    study_fields["grid"]["iterations"] = [5, 10, 20]
    train(root, study_fields, checkpoint_every=4, keep_last=9)
    assert trunk_steps(root)[0] == 7  # from the good one before it
    (warning,) = (
        event["text"] for event in read_events(series_folder(root)) if event["event"] == Event.WARNING
    )
    assert file.name in warning
    again = {held.tag: held for held in checkpoints.marked(newest.folder)}[newest.tag]
    assert checkpoints.inspect(again) is None
    assert not list(newest.folder.glob("*.damaged"))
    assert losses(root, study_fields) == undisturbed(study_fields)


def test_an_attempt_that_is_fenced_while_it_saves_writes_no_marker(
    engine: Engine, tmp_path: Path, heartbeat: Heartbeat
) -> None:
    old = Journal.open(tmp_path / "series" / "a")
    Journal.open(tmp_path / "series" / "a").close()
    folder = tmp_path / "checkpoints"
    with pytest.raises(Fenced):
        save(
            engine,
            folder,
            Marker(step=3, tokens=9, ranks=1, zero_stage=0, branch=False, files={}),
            heartbeat,
            old.check_fence,
        )
    assert (folder / tag_of(3)).is_dir()  # it may be the newer attempt's by now
    assert checkpoints.marked(folder) == []


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "left"),
    [
        (1, False, [3, 8, 9]),
        (2, False, [3, 7, 8, 9]),
        (9, False, [1, 2, 3, 5, 7, 8, 9]),
        (1, True, [2, 3, 8, 9]),
    ],
)
def test_branch_points_and_the_newest_others_are_kept(
    tmp_path: Path, keep_last: int, keep_best: bool, left: list[int]
) -> None:
    for step, loss in {1: None, 2: 1.0, 3: 3.0, 5: 2.0, 7: None, 8: 1.5, 9: 9.0}.items():
        (tmp_path / tag_of(step)).mkdir()
        marker = Marker(step=step, tokens=1, ranks=1, zero_stage=0, branch=step == 3, loss=loss, files={})
        (tmp_path / f"{tag_of(step)}.complete").write_text(marker.sealed().model_dump_json())
    (tmp_path / tag_of(4)).mkdir()  # never completed
    (tmp_path / tag_of(6)).mkdir()
    (tmp_path / f"{tag_of(6)}.complete").write_text('{"of": "a newer version"}')
    retire(tmp_path, 8, keep_last=keep_last, keep_best=keep_best)
    assert [held.marker.step for held in checkpoints.marked(tmp_path)] == left
    assert not (tmp_path / tag_of(4)).exists()
    assert (tmp_path / tag_of(6)).exists()


def test_training_keeps_as_many_checkpoints_as_its_launch_says(tmp_path: Path, study_fields: Fields) -> None:
    root = Root(tmp_path / "runs")
    study_fields["grid"]["iterations"] = [20]
    train(root, study_fields, checkpoint_every=2, keep_last=3)
    held = checkpoints.marked(series_folder(root) / "checkpoints")
    assert [found.marker.step for found in held] == [10, 12, 14, 16]
