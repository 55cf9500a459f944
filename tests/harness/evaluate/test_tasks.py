"""Tasks that share the prompts of runs give the scores and files of one process, whatever the shares and the kills."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.dispatch.part import Part
from harness.evaluate.evaluator import Evaluator
from harness.evaluate.request import Request
from harness.evaluate.scores import blocks_left, whole_of
from harness.evaluate.sharing import Block, Slice, joined, share_out
from harness.evaluate.tasks import Ended, Held, make_parts, slices_of
from harness.plan.cluster import this_machine
from harness.record.registry import ResolvedStudy
from harness.record.root import Root
from harness.record.scores import EvaluationRow, evaluation_folder, evaluation_rows
from harness.record.status import StatusReader
from harness.submit.parts import PartState, PartStatus, states_of_parts
from harness.train.part import work_on
from harness.train.stopping import StopFlag
from tests.conftest import Command, Write
from tests.harness.journals import registered
from tests.studies import Fields

REQUEST = Request(limit=7, batch=2)
"""Four blocks a run, the last one smaller."""


@pytest.fixture
def study(trained: Root, study_fields: Fields) -> ResolvedStudy:
    return registered(trained, study_fields)


def parts_of(study: ResolvedStudy, count: int, request: Request = REQUEST) -> list[Part]:
    """Return the tasks that the runs of a study are left for."""
    evaluator, cluster = Evaluator.of(study, request), this_machine()
    rows = StatusReader(study.root, study.study.name).read(study.points)
    return make_parts(
        whole_of(study, evaluator), blocks_left(evaluator, rows, cluster), Held([]), cluster, count
    )


def values(study: ResolvedStudy) -> dict[tuple[str, str], float]:
    rows: Sequence[EvaluationRow] = evaluation_rows(study)
    return {(row.run_id, row.metric): row.value for row in rows}


@pytest.fixture
def serial(study: ResolvedStudy) -> dict[tuple[str, str], float]:
    """The scores of one process, whose files are removed."""
    evaluator = Evaluator.of(study, REQUEST)
    assert {evaluator.evaluate(point.run_id).outcome for point in study.points} == {"evaluated"}
    found = values(study)
    for point in study.points:
        shutil.rmtree(evaluation_folder(study.root, point.run_id))
    shutil.rmtree(study.root.path / "evaluation")
    return found


@pytest.mark.parametrize("count", [1, 3, 8])
def test_scores_do_not_depend_on_the_number_of_tasks(
    study: ResolvedStudy, serial: dict[tuple[str, str], float], count: int
) -> None:
    parts = parts_of(study, count)
    assert len(parts) == count
    for part in reversed(parts):
        assert work_on(part.order, StopFlag()) == "finished"
    assert values(study) == serial
    assert parts_of(study, count) == []


def test_a_task_that_is_stopped_or_dies_makes_no_row_twice(
    study: ResolvedStudy, serial: dict[tuple[str, str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssmttm.generation as generation

    made, generate = list[int](), generation.generate

    def dying(*arguments: Any) -> Any:
        if len(made) == 3:
            made.append(0)
            raise SystemExit(1)
        made.append(len(arguments[-1]))
        return generate(*arguments)

    monkeypatch.setattr(generation, "generate", dying)
    parts = parts_of(study, 2)
    stop = StopFlag()
    stop.reason = signal.SIGTERM.name
    assert work_on(parts[0].order, stop) == "preempted"
    with pytest.raises(SystemExit):
        work_on(parts[0].order, StopFlag())
    for part in parts:
        assert work_on(part.order, StopFlag()) == "finished"
    assert sum(made) == 2 * 7
    assert values(study) == serial


def test_a_run_without_weights_fails_its_task_and_the_others_are_scored(study: ResolvedStudy) -> None:
    first, second = (point.run_id for point in study.points)
    (part,) = parts_of(study, 1)
    (study.root.run(first) / "checkpoints" / "model.safetensors").unlink()
    assert work_on(part.order, StopFlag()) == "failed"
    assert {run_id for run_id, _ in values(study)} == {second}


def test_prompts_that_have_changed_since_are_refused(study: ResolvedStudy, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A tone\n")
    (part,) = parts_of(study, 1, Request(prompts=prompts))
    prompts.write_text("Another tone\n")
    assert work_on(part.order, StopFlag()) == "failed"
    assert values(study) == {}


def test_a_finished_task_whose_results_are_gone_is_done_again(study: ResolvedStudy) -> None:
    (before,) = parts_of(study, 1)
    assert work_on(before.order, StopFlag()) == "finished"
    found = values(study)
    for point in study.points:
        shutil.rmtree(evaluation_folder(study.root, point.run_id))
    (part,) = parts_of(study, 1)
    assert part.series_id != before.series_id
    assert work_on(part.order, StopFlag()) == "finished"
    assert values(study) == found


def test_a_chained_task_leaves_out_runs_that_are_not_finished(study: ResolvedStudy) -> None:
    first, second = (point.run_id for point in study.points)
    evaluator, cluster = Evaluator.of(study, REQUEST), this_machine()
    rows = StatusReader(study.root, study.study.name).read(study.points)
    whole = whole_of(study, evaluator, only_finished=True)
    (part,) = make_parts(whole, blocks_left(evaluator, rows, cluster), Held([]), cluster, 1)
    shutil.rmtree(study.root.run(first) / "journal")
    assert work_on(part.order, StopFlag()) == "finished"
    assert {run_id for run_id, _ in values(study)} == {second}


def test_a_live_task_has_the_runs_for_whose_jobs_it_waits(study: ResolvedStudy) -> None:
    first, second = (point.run_id for point in study.points)
    evaluator, cluster = Evaluator.of(study, REQUEST), this_machine()
    rows = StatusReader(study.root, study.study.name).read(study.points)
    whole, blocks = whole_of(study, evaluator), blocks_left(evaluator, rows, cluster)
    (part,) = make_parts(whole, blocks, Held([]), cluster, 1, {first: "7", second: "7"})
    assert part.after == ("7",)
    held = Held([PartStatus(part, PartState.QUEUED, 0)])
    assert make_parts(whole, blocks, held, cluster, 1, {first: "7"}) == []
    (again,) = make_parts(
        whole, blocks, held, cluster, 1, {first: "8"}
    )  # which began after the task was submitted
    assert {one.run_id for one in slices_of(again)} == {first}
    over = Held([PartStatus(part, PartState.FAILED, 0)])
    assert len(make_parts(whole, blocks, over, cluster, 1)) == 1


# -- shares


def blocks(*seconds: float) -> list[Block]:
    return [
        Block(Slice(run_id="a", first=2 * number, last=2 * number + 2), one)
        for number, one in enumerate(seconds)
    ]


@pytest.mark.parametrize("count", range(1, 9))
def test_tasks_take_all_blocks_in_order_and_about_the_same_time(count: int) -> None:
    every = blocks(*[10.0] * 16)
    shares = share_out(every, count)
    assert len(shares) == count
    assert [block for share in shares for block in share] == every
    lengths = {len(share) for share in shares}
    assert max(lengths) - min(lengths) <= 1


def test_a_task_has_one_block_at_least_and_ten_minutes_by_itself() -> None:
    assert [len(share) for share in share_out(blocks(1000, 1, 1), 9)] == [1, 1, 1]
    assert [len(share) for share in share_out(blocks(1000, 1, 1), 3)] == [1, 1, 1]
    assert [len(share) for share in share_out(blocks(*[100] * 12))] == [6, 6]
    assert len(share_out(blocks(1, 1, 1))) == 1
    assert joined(blocks(1, 1, 1)) == [Slice(run_id="a", first=0, last=6)]


# -- the commands


@pytest.fixture
def evaluate(ssmscale: Command, trained: Root, study: ResolvedStudy) -> Command:
    """`ssmscale evaluate` of the study."""
    return lambda *words: ssmscale("evaluate", "tiny", *words, "--root", trained.path)


def test_the_command_evaluates_by_tasks_here(
    study: ResolvedStudy, serial: dict[tuple[str, str], float], evaluate: Command
) -> None:
    asked = ("--limit", 7, "--batch", 2, "--on", "local", "--parts", 2, "--jobs", 1, "--json")
    answer = evaluate(*asked)
    assert answer.status == 0, answer.err
    assert {run["outcome"] for run in answer.document["runs"]} == {"evaluated"}
    assert values(study) == serial
    again = evaluate(*asked)
    assert {run["outcome"] for run in again.document["runs"]} == {"kept"}
    assert "task" not in again.err


def test_a_run_that_cannot_be_evaluated_is_named_and_the_command_fails(
    study: ResolvedStudy, evaluate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.cli.tasks.do_here", worked_here)
    first, second = (point.run_id for point in study.points)
    (study.root.run(first) / "checkpoints" / "model.safetensors").unlink()
    answer = evaluate("--limit", 2, "--on", "local", "--json")
    assert answer.status == 1
    outcomes = {run["run_id"]: run for run in json.loads(answer.out)["runs"]}
    assert outcomes[second]["outcome"] == "evaluated"
    assert outcomes[first]["outcome"] == "failed"
    assert f"the weights of run {first} are missing" in outcomes[first]["reason"]


def test_pieces_do_not_depend_on_the_tasks(
    ssmscale: Command, trained: Root, study: ResolvedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("generate", "pieces"):
        monkeypatch.setattr(f"harness.evaluate.{module}.BATCH", 2)
    monkeypatch.setattr("harness.cli.tasks.do_here", worked_here)
    Path("prompts.txt").write_text("".join(f"A piece in {n} parts\n" for n in range(5)))
    asked = ("generate", study.points[0].run_id, "--prompts", "prompts.txt", "--root", trained.path, "--out")
    one = ssmscale(*asked, "one", "--json")
    tasks = ("--on", "local", "--parts", 2, "--json")
    shared = ssmscale(*asked, "shared", *tasks)
    assert len(one.document["pieces"]) == len(shared.document["pieces"]) == 5
    for path in Path("one").iterdir():
        assert path.read_bytes() == Path("shared", path.name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in Path("shared").iterdir()}
    Path("shared/4.wav").unlink()
    ssmscale(*asked, "shared", *tasks)
    after = {path: path.stat().st_mtime_ns for path in Path("shared").iterdir()}
    assert {path.name for path in before if before[path] != after[path]} == {"4.wav", "4.wav.json"}


def worked_here(whole: Any, some: Sequence[Block], _: Any, cluster: Any, count: int, __: Callable) -> Any:
    """Do the work of tasks in this process."""
    parts = make_parts(whole, some, Held([]), cluster, count)
    for part in parts:
        assert work_on(json.loads(json.dumps(part.order)), StopFlag()) in {"finished", "failed"}
    return Ended([], 0, Held(states_of_parts(parts, whole.jobs_dir)))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--parts", "3"], "--parts 3: applies to tasks; say with --on where they run"),
        (["--cluster", "dev"], "--cluster dev: applies to tasks"),
        (["--on", "moon"], "--on moon: no such backend"),
        (["--on", "slurm"], "--on slurm: name the cluster with --cluster"),
        (["--on", "local", "--device", "cpu"], "--device cpu: applies to this process"),
        (["--on", "local", "--parts", "0"], "--parts"),
        (["--on", "local", "--jobs", "0"], "--jobs"),
        (["--on", "local", "--nodes", "2"], "--nodes 2: applies to packed series"),
    ],
)
def test_options_that_contradict_are_refused(
    ssmscale: Command, evaluate: Command, trained: Root, words: list[str], reason: str
) -> None:
    evaluate(*words).assert_refused(reason)
    generate = ("generate", "0" * 12, "--prompts", "none.txt", "--out", "pieces", "--root", trained.path)
    ssmscale(*generate, *words).assert_refused(reason)
    assert not (trained.study("tiny") / "evaluate").exists()


def test_training_here_is_followed_by_an_evaluation(
    ssmscale: Command,
    study: ResolvedStudy,
    study_fields: Fields,
    write_study: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.cli.tasks.do_here", worked_here)
    submit = ("submit", write_study(study_fields), "--on", "local", "--root", study.root.path, "--then")
    ssmscale(*submit, "report").assert_refused(
        "--then report: no such verb follows training; choose evaluate"
    )
    answer = ssmscale(*submit, "evaluate")
    assert answer.status == 0, answer.err
    assert "fd_mel_proxy" in answer.out
    assert {row.settings for row in evaluation_rows(study)} == {
        "held-out",
        Evaluator.of(study, Request()).settings.digest,
    }


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--jobs", "2"], "--jobs 2: applies to tasks on this machine"),
        (["--prompts", "prompts.txt"], "--prompts: /"),
        (["--nodes", "2"], "--nodes 2: applies to packed series"),
    ],
)
def test_a_cluster_that_cannot_do_the_tasks_is_refused(
    evaluate: Command, trained: Root, study: ResolvedStudy, tmp_path: Path, words: list[str], reason: str
) -> None:
    shared = [str(trained.path), str(study.study.corpus.path)]
    profile = {"name": "far", "partitions": ["gpu"], "gpus": 0, "cores": 4, "memory_gib": 8, "shared": shared}
    (tmp_path / "far.yaml").write_text(json.dumps(profile))
    Path("prompts.txt").write_text("A tone\n")
    evaluate("--on", "slurm", "--cluster", tmp_path / "far.yaml", *words).assert_refused(reason)
    assert not (trained.study("tiny") / "evaluate").exists()


def test_one_caption_is_no_work_for_tasks(ssmscale: Command) -> None:
    words = ("generate", "0" * 12, "--prompt", "A tone", "--out", "a.wav", "--on", "local")
    ssmscale(*words).assert_refused("--on local: divides a file of captions among tasks; give --prompts FILE")
