"""No fault of a process, a disk, a file or a clock loses a finished step or counts one twice.

The faults are real: processes are killed, disks are full, files are damaged and clocks are set. Afterwards all Runs end
with the same losses, to the bit, and MLflow holds every journalled step exactly once.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.common.validation import validate
from harness.record import checkpoints
from harness.record.journal import read_progress
from harness.record.nodes import NodeFailure
from harness.record.registry import resolve
from harness.record.root import Root
from harness.record.status import RunState, StatusReader
from harness.study.schema import Study
from harness.train.loop import SeriesTrainer
from harness.train.stopping import EXIT_NO_SPACE
from tests.conftest import Command, Write, fill, flip_a_byte
from tests.harness.faults import Story, step_files
from tests.harness.journals import read_events, rows_of
from tests.harness.trainer import losses, progress_of, train
from tests.studies import Fields, tiny_study, with_iterations
from tests.waiting import PATIENCE

LENGTHS = (12, 30)


def rooted(path: Path, store: Path) -> Root:
    """Make a ROOT with an empty MLflow store."""
    root = Root(path)
    root.path.mkdir(parents=True)
    shutil.copy(store, root.path / "mlflow.db")
    return root


@pytest.fixture(scope="module")
def fields(tiny_corpus: Path) -> Fields:
    return with_iterations(tiny_study(tiny_corpus), *LENGTHS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, fields: Fields) -> list[float]:
    return Story(Root(tmp_path_factory.mktemp("undisturbed")), fields).finish()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, fields: Fields, empty_store: Path) -> Path:
    """A mirrored ROOT whose worker was killed on the trunk after two checkpoints; copy it."""
    story = Story(rooted(tmp_path_factory.mktemp("interrupted") / "runs", empty_store), fields)
    assert story.attempt(story.at_step(8)) == -9
    story.mirror()
    assert len(list(story.series.glob("checkpoints/*.complete"))) >= 2  # 3 until the oldest is removed
    return story.root.path


@pytest.fixture
def halfway(interrupted: Path, tmp_path: Path, fields: Fields) -> Story:
    """An interrupted story."""
    return Story(Root(shutil.copytree(interrupted, tmp_path / "runs")), fields)


@pytest.mark.parametrize("stories", [1, pytest.param(25, marks=pytest.mark.verify)])
def test_kills_at_any_instant_change_no_loss_and_no_count(
    tmp_path: Path, fields: Fields, empty_store: Path, undisturbed: list[float], stories: int
) -> None:
    chance, kills = random.Random(1), 0
    for number in range(stories):
        story = Story(rooted(tmp_path / f"runs-{number}", empty_store), fields)
        for moment in (
            story.while_saving,
            story.while_evaluating,
            story.at_step(chance.randint(1, sum(LENGTHS))),
            story.after(chance.uniform(0.0, 0.8)),
        ):
            ended = story.attempt(moment)
            assert ended in {-9, 0}, story.log()
            kills += ended == -9
            story.mirror()
        assert story.finish() == undisturbed
        story.mirror()
        story.check_mlflow()
    assert kills >= 2 * stories


def cut_a_checkpoint_short(story: Story) -> str:
    file = step_files(story)[1]
    with file.open("r+b") as held:
        held.truncate(file.stat().st_size // 2)
    return file.name


def damage_a_byte_of_a_checkpoint(story: Story) -> str:
    file = step_files(story)[-1]
    flip_a_byte(file)
    return file.name


def damage_a_byte_of_a_marker(story: Story) -> str:
    marker = step_files(story)[0]
    flip_a_byte(marker, marker.read_bytes().index(b'"tokens": ') + 10)
    return marker.name


def torn(journal: bytes) -> bytes:
    return journal + b'{"t": 1.0, "event": "step", "step": 9, "lo'


def with_garbage(journal: bytes) -> bytes:
    lines = journal.splitlines(keepends=True)
    lines.insert(len(lines) // 2, b'\x00\xff\n{"t": 1, "event": "step", "step": -4, "loss": 0.1}\n\n')
    return b"".join(lines)


@pytest.mark.parametrize(
    ("damage", "journal"),
    [
        (cut_a_checkpoint_short, torn),
        (damage_a_byte_of_a_checkpoint, with_garbage),
        (damage_a_byte_of_a_marker, bytes),
    ],
)
def test_damage_is_reported_and_costs_no_step(
    halfway: Story,
    undisturbed: list[float],
    damage: Callable[[Story], str],
    journal: Callable[[bytes], bytes],
) -> None:
    named, newest = damage(halfway), max(halfway.series.glob("journal/*.jsonl"))
    newest.write_bytes(journal(newest.read_bytes()))
    reader = StatusReader(halfway.root, "tiny")
    reader.read(resolve(validate(Study, halfway.fields, "t"), halfway.root, "t").points)
    assert bool(reader.notes) is (journal is not bytes)
    assert halfway.finish() == undisturbed
    assert named in halfway.warnings()
    halfway.mirror()
    halfway.check_mlflow()


@pytest.mark.verify
def test_no_byte_of_a_marker_can_change_unnoticed(halfway: Story) -> None:
    marker = step_files(halfway)[0]
    content = marker.read_bytes()
    good = checkpoints.marked(marker.parent)[-1].marker
    for place in range(len(content)):
        flip_a_byte(marker, place)
        found = [held.marker for held in checkpoints.marked(marker.parent) if held.tag == marker.stem]
        assert found in ([], [good]), place  # white space may change
        marker.write_bytes(content)


def test_a_clock_set_back_a_day_orders_nothing(halfway: Story, undisturbed: list[float]) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian: faketime)")
    done = subprocess.run(
        [sys.executable, "-m", "harness.train.worker", *map(str, halfway.run_dirs)],
        env=os.environ | {"LD_PRELOAD": str(library), "FAKETIME": "-1d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:] + halfway.log()
    first, second = (
        [event["t"] for event in read_events(halfway.series) if event["attempt"] == attempt]
        for attempt in (1, 2)
    )
    assert max(second) < min(first) - 80_000
    progress = read_progress(halfway.series)
    assert (progress.attempt, progress.state) == (2, "finished")
    assert losses(halfway.root, halfway.fields) == undisturbed
    halfway.mirror()
    halfway.check_mlflow()


def states_of(story: Story) -> set[RunState]:
    return {row.state for row in rows_of(story.root, story.fields)}


@pytest.mark.parametrize("when", ["while_saving", pytest.param("while_evaluating", marks=pytest.mark.verify)])
def test_a_disk_that_fills_up_interrupts_and_the_same_command_goes_on(
    small_disk: Callable[[int], Path],
    fields: Fields,
    empty_store: Path,
    undisturbed: list[float],
    when: str,
) -> None:
    disk = small_disk(32 * 2**20)
    story = Story(rooted(disk / "runs", empty_store), fields)
    story.mirror()
    filled: list[Path] = []
    assert story.attempt(getattr(story, when), lambda: filled.append(fill(disk))) == EXIT_NO_SPACE
    assert states_of(story) == {RunState.INTERRUPTED}
    assert not story.while_saving()  # no incomplete checkpoint takes up space
    assert all(read_progress(folder).damaged == () for folder in story.folders)
    filled[0].unlink()
    story.mirror()
    assert story.finish() == undisturbed
    story.mirror()
    story.check_mlflow()


def test_a_full_disk_interrupts_at_the_journal_if_nothing_else_is_written(
    small_disk: Callable[[int], Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    fields = with_iterations(tiny_study(tiny_corpus), 50)
    never = {"checkpoint_every": 10_000, "eval_every": None}
    expected = Story(Root(tmp_path / "apart"), fields, **never).finish()
    disk = small_disk(8 * 2**20)
    story = Story(Root(disk / "runs"), fields, **never)
    filled: list[Path] = []
    assert story.attempt(story.at_step(5), lambda: filled.append(fill(disk))) == EXIT_NO_SPACE
    progress = read_progress(story.series)
    assert 5 <= max(progress.steps) < 40  # before the trunk's end, where it would have saved
    assert progress.damaged == ()
    assert states_of(story) == {RunState.INTERRUPTED}
    filled[0].unlink()
    assert story.finish() == expected


@pytest.mark.parametrize("ranks", [{}, pytest.param({"ranks": 2, "zero_stage": 1}, marks=pytest.mark.verify)])
def test_submit_names_the_full_disk_and_the_remedy(
    small_disk: Callable[[int], Path],
    fields: Fields,
    empty_store: Path,
    undisturbed: list[float],
    write_study: Write,
    ssmscale: Command,
    tmp_path: Path,
    ranks: dict[str, int],
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    resources = {"checkpoint_every": 3, "keep_last": 10}
    tracking = {"log_every": 1, "uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    study = write_study({**fields, "resources": resources | ranks, "tracking": tracking})
    disk = small_disk(1280 * 2**10)
    answer = ssmscale("submit", study, "--on", "local", "--root", disk / "runs")
    assert answer.status == 1, answer.out + answer.err
    (sentence,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert str(disk / "runs" / "series") in sentence
    assert "ssmscale prune tiny" in sentence
    assert list(disk.glob("runs/series/*/checkpoints/*.complete"))  # earlier checkpoints stay
    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    again = ssmscale("submit", study, "--on", "local", "--root", disk / "runs")
    assert again.status == 0, again.out + again.err
    assert losses(Root(disk / "runs"), fields) == pytest.approx(undisturbed, abs=1e-4 if ranks else 0.0)


@pytest.mark.parametrize("failure", ["memory", "corpus"])
def test_a_failure_of_the_node_fails_no_run_of_a_job_and_is_said_of_this_machine(
    tmp_path: Path, fields: Fields, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    if failure == "memory":
        text = "CUDA error: uncorrectable ECC error encountered"

        def fail(*_: object) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr(SeriesTrainer, "train", fail)
        changes = {}
    else:
        changes = {"corpus": tmp_path / "unmounted"}
        text = f"{changes['corpus']}: is not there on this node"

    def failed(root: Root) -> list[str]:
        return [str(one.result["reason"]) for one in progress_of(root, fields) if one.result is not None]

    with monkeypatch.context() as job:
        job.setenv("SLURM_JOB_ID", "7")
        with pytest.raises(NodeFailure, match=re.escape(text)):
            train(Root(tmp_path / "job"), fields, **changes)
    assert failed(Root(tmp_path / "job")) == []
    train(Root(tmp_path / "here"), fields, **changes)
    reasons = failed(Root(tmp_path / "here"))
    assert len(reasons) == len(LENGTHS)
    assert failure == "corpus" or reasons[0].endswith("this machine has failed, and not the run")
