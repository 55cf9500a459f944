"""`ssmscale evaluate`: every finished run of a study is measured once, whatever interrupts it."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from filelock import FileLock

from harness.common.disk import DiskFull
from harness.evaluate.evaluator import Evaluator, Request, held_out_scores
from harness.evaluate.model import load_trained
from harness.record.journal import read_progress
from harness.record.registry import ResolvedStudy, resolve_registered
from harness.record.root import Root
from harness.record.scores import evaluation_folder, evaluation_rows, keep_evaluation
from harness.tracking.experiment import ID
from harness.tracking.store import default_uri
from harness.tracking.tracker import Tracker
from ssmttm.evaluation.row_store import RowStore
from tests.conftest import Command
from tests.harness.journals import registered, rows_of, write_finished
from tests.harness.scores import SETTINGS, scored
from tests.ssmttm.judges import write_tiny_ast, write_tiny_clap
from tests.studies import Fields

# -- the loss


@pytest.mark.parametrize("micro_batch", [None, 1, 5])
def test_the_loss_from_the_final_weights_is_the_one_training_recorded(
    there: Path, micro_batch: int | None
) -> None:
    root = Root(there)
    for folder in (root.path / "runs").iterdir():
        recorded = read_progress(folder).result
        assert recorded is not None
        clips, scores = held_out_scores(load_trained(root, folder.name), micro_batch)
        assert clips == 16
        assert scores["ce"] == pytest.approx(recorded["loss"], abs=1e-6)
        assert [scores["ce_0"], scores["ce_1"]] == pytest.approx(recorded["loss_codebooks"], abs=1e-6)
        assert scores["ppl_1"] == pytest.approx(math.exp(scores["ce_1"]))


# -- what is generated


@pytest.fixture
def trained(there: Path, tmp_path: Path) -> Root:
    """A copy of a ROOT with two trained runs of the study `tiny`."""
    shutil.copytree(there, tmp_path / "runs")
    return Root(tmp_path / "runs")


@pytest.fixture
def evaluate(ssmscale: Command, trained: Root) -> Command:
    """`ssmscale evaluate` of the study."""
    return lambda *words: ssmscale("evaluate", "tiny", *words, "--root", trained.path)


def studied(root: Root) -> ResolvedStudy:
    found = resolve_registered(root, "tiny")
    assert found is not None
    return found


def run_ids(root: Root) -> list[str]:
    return [point.run.run_id for point in studied(root).points]


def files_of(root: Root, run_id: str, ending: str = "npz") -> dict[str, int]:
    """What lies in an evaluation's folder, with when it was written."""
    folder = evaluation_folder(root, run_id)
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob(f"*.{ending}")}


def test_each_run_is_scored_against_held_out_clips_and_not_a_second_time(trained: Root) -> None:
    request = Request(limit=6, batch=4)
    first = Evaluator(studied(trained), request)
    assert [first.evaluate(run).outcome for run in run_ids(trained)] == ["evaluated", "evaluated"]
    rows = evaluation_rows(studied(trained))
    scored = {(row.run_id, row.metric): row for row in rows if row.settings == first.settings.digest}
    (proxy,) = {metric for _, metric in scored}
    assert proxy.startswith("fd_mel_proxy-")
    assert all(row.value > 0 and row.n_prompts == 6 for row in scored.values())
    assert {row.metric for row in rows if row.settings == "held-out"} == {
        *("ce", "ce_0", "ce_1", "ppl", "ppl_0", "ppl_1")
    }
    before = files_of(trained, run_ids(trained)[0], "*")
    again = Evaluator(studied(trained), request)
    assert [again.evaluate(run).outcome for run in run_ids(trained)] == ["kept", "kept"]
    assert files_of(trained, run_ids(trained)[0], "*") == before
    assert evaluation_rows(studied(trained)) == rows


class Killed(BaseException):
    pass


def test_an_evaluation_that_was_killed_repeats_no_finished_batch(trained: Root) -> None:
    (run, _), request = run_ids(trained), Request(limit=6, batch=2)
    undisturbed = Evaluator(studied(trained), replace(request, batch=6))
    said: list[str] = []

    def kill(what: str) -> None:
        said.append(what)
        if "generating, 4 of 6" in what:
            raise Killed

    with pytest.raises(Killed):
        Evaluator(studied(trained), request, kill).evaluate(run)
    made = files_of(trained, run)
    assert len(made) == 2
    assert Evaluator(studied(trained), request, said.append).evaluate(run).outcome == "evaluated"
    assert made.items() <= files_of(trained, run).items()
    assert [what.split(", ")[1] for what in said if "generating" in what] == [
        *("0 of 6 prompts", "2 of 6 prompts", "4 of 6 prompts", "4 of 6 prompts")
    ]
    (resumed,) = codes_of(trained, run)
    shutil.rmtree(evaluation_folder(trained, run))
    undisturbed.evaluate(run)
    (whole,) = codes_of(trained, run)
    assert np.array_equal(resumed, whole)


def codes_of(root: Root, run_id: str) -> list[np.ndarray]:
    """The generated codes of a run (prompts, codebooks, frames), an entry a setting."""
    return [RowStore(path).read()["codes"] for path in evaluation_folder(root, run_id).glob("*/codes")]


def test_a_judge_added_later_needs_no_generation(trained: Root, tmp_path: Path) -> None:
    (run, _) = run_ids(trained)
    Evaluator(studied(trained), Request(limit=4)).evaluate(run)
    before = files_of(trained, run)
    judges = {
        "clap": str(write_tiny_clap(tmp_path / "clap")),
        "tagger": str(write_tiny_ast(tmp_path / "ast")),
    }
    later = Evaluator(studied(trained), Request(limit=4, **judges))
    ended = later.evaluate(run)
    assert any("4 clips for 16 dimensions" in note for note in ended.notes)
    assert before.items() <= files_of(trained, run).items()
    metrics = {row.metric.split("-")[0] for row in evaluation_rows(studied(trained))}
    assert {"fd_mel_proxy", "fd_clap", "clap_score", "kl_softmax_ast"} <= metrics
    assert later.skipped == {}
    assert later.evaluate(run).outcome == "kept"


def test_damaged_codes_and_arrays_are_named_and_made_again(trained: Root, evaluate: Command) -> None:
    run, other = run_ids(trained)
    Evaluator(studied(trained), Request(limit=4)).evaluate(run)
    before, codes = evaluation_rows(studied(trained)), codes_of(trained, run)
    damaged = sorted(evaluation_folder(trained, run).rglob("*.npz"))
    damaged += sorted((trained.path / "evaluation").rglob("*.npz"))
    assert len(damaged) == 3
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-30])
    for path in evaluation_folder(trained, run).glob("*.json"):
        path.unlink()
    answer = evaluate("--limit", 4, "--json")
    outcomes = {one["run_id"]: one["outcome"] for one in answer.document["runs"]}
    assert outcomes == dict.fromkeys((run, other), "evaluated")
    for path in damaged:
        assert answer.err.count(f"warning: {path}: was damaged (") == 1
    assert [row for row in evaluation_rows(studied(trained)) if row.run_id == run] == before
    assert np.array_equal(codes_of(trained, run), codes)


def test_a_disk_that_fills_up_is_named_and_what_was_measured_is_kept(
    trained: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (run, _), request = run_ids(trained), Request(limit=2)
    with monkeypatch.context() as patched:
        patched.setattr("ssmttm.evaluation.row_store.write_atomically", full)
        with pytest.raises(DiskFull, match=f"{run}/evaluation: no room is left"):
            Evaluator(studied(trained), request).evaluate(run)
    kept = files_of(trained, run, "json")
    assert list(kept) == ["held-out.json"]
    assert Evaluator(studied(trained), request).evaluate(run).outcome == "evaluated"
    assert kept.items() <= files_of(trained, run, "json").items()


def test_two_processes_do_not_evaluate_one_run_at_once(trained: Root) -> None:
    (run, other) = run_ids(trained)
    evaluator = Evaluator(studied(trained), Request(limit=2))
    evaluation_folder(trained, run).mkdir()
    with FileLock(evaluation_folder(trained, run) / "lock"):
        assert [evaluator.evaluate(one).outcome for one in (run, other)] == ["busy", "evaluated"]


# -- prompts and references of the user's own


def test_prompts_are_paired_with_the_recordings_they_name(trained: Root, tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for number in range(2):
        tone = np.sin(np.arange(24000) * 0.05 * (number + 1))
        soundfile.write(recordings / f"clip{number}.wav", tone, 24000)
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("ytid,caption\nclip1,A tone\ngone,Silence\nclip0,A lower tone\n", encoding="utf-8")
    judge = str(write_tiny_ast(tmp_path / "ast"))
    paired = Evaluator(studied(trained), Request(prompts=prompts, reference=recordings, tagger=judge))
    assert paired.prompts.captions == ("A tone", "A lower tone")
    assert paired.evaluate(run_ids(trained)[0]).outcome == "evaluated"
    assert any("left out: 1 prompt whose recording" in note for note in paired.notes)
    assert any(row.metric.startswith("kl_softmax_ast") for row in evaluation_rows(studied(trained)))
    loose = Evaluator(studied(trained), Request(prompts=prompts, tagger=judge))
    assert "kl_softmax_ast" in loose.skipped
    assert loose.settings.digest != paired.settings.digest


# -- the command


def test_the_command_evaluates_a_study_and_tells_mlflow(
    trained: Root, empty_store: Path, tmp_path: Path, evaluate: Command
) -> None:
    shutil.copyfile(empty_store, trained.path / "mlflow.db")
    out = tmp_path / "metrics.csv"
    for _ in range(2):
        document = evaluate("--limit", 2, "--json", "--out", out).document
    assert [run["outcome"] for run in document["runs"]] == ["kept", "kept"]
    assert set(document["skipped"]) == {"fd_clap", "clap_score", "kl_softmax_ast"}
    table = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [float(row["value"]) for row in table] == [row["value"] for row in document["rows"]]
    (settings,) = set(document["settings"]) - {"held-out"}
    iterations = {row["run_id"]: row["iterations"] for row in document["rows"]}
    for run_id in run_ids(trained):
        mine = {row["metric"]: float(row["value"]) for row in table if row["run_id"] == run_id}
        assert len(mine) == 7
        for metric, value in mine.items():
            place = "held-out" if metric.startswith(("ce", "ppl")) else settings
            assert told(trained, run_id, metric, place) == [(iterations[run_id], value)]


def test_a_note_of_scores_that_came_from_elsewhere_moves_no_cursor(trained: Root, evaluate: Command) -> None:
    command = (run_ids(trained)[0], "--limit", 1)
    assert evaluate(*command).status == 0
    (path,) = evaluation_folder(trained, run_ids(trained)[0]).glob("[0-9a-f]*[0-9a-f].json")
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"notes": ["few\x1b[2Jclips"]}))
    assert "note: few [2Jclips" in evaluate(*command).err


def test_a_tracker_that_is_gone_costs_a_warning_and_hears_it_from_sync(
    trained: Root, empty_store: Path, monkeypatch: pytest.MonkeyPatch, evaluate: Command, ssmscale: Command
) -> None:
    run = run_ids(trained)[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    answer = evaluate(run, "--limit", 2)
    assert answer.status == 0
    assert "warning: MLflow at http://127.0.0.1:9" in answer.err
    assert "codec-decoded held-out clips" in answer.out
    assert "not measured: fd_clap: give --clap" in answer.out
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.copyfile(empty_store, trained.path / "mlflow.db")
    assert ssmscale("sync", "tiny", "--root", trained.path).status == 0
    (row,) = [row for row in evaluation_rows(studied(trained)) if row.metric == "ce"]
    assert told(trained, run, "ce") == [(row.iterations, row.value)]


def told(root: Root, run_id: str, metric: str, settings: str = "held-out") -> list[tuple[int, float]]:
    """What MLflow has heard of one metric: steps and values."""
    experiment = Tracker(default_uri(root), "tiny", root).experiment
    (held,) = experiment.search(ID, run_id)
    history = experiment.client.get_metric_history(held.mlflow_id, f"eval/{settings}/{metric}")
    return [(one.step, one.value) for one in history]


def test_a_score_that_is_added_later_is_told_and_no_other_twice(
    tracked_root: Root, study_fields: Fields
) -> None:
    resolved = registered(tracked_root, study_fields)
    write_finished(tracked_root, resolved.points)
    run, iterations = resolved.points[0].run_id, resolved.points[0].run.iterations
    for scores in ({"fd_a-1": 1.0}, {"fd_a-1": 1.0, "fd_b-2": 2.0}):
        keep_evaluation(tracked_root, run, scored(SETTINGS, **scores))
        for _ in range(2):
            mirrored = Tracker(default_uri(tracked_root), "tiny", tracked_root)
            mirrored.mirror(rows_of(tracked_root, study_fields), settle=True)
        for name, value in scores.items():
            assert told(tracked_root, run, name, SETTINGS.digest) == [(iterations, value)]


def test_mistakes_are_named(tmp_path: Path, evaluate: Command) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, word in (
        (["--clap", tmp_path / "no-clap"], "--clap"),
        (["--prompts", tmp_path / "no.csv"], "no such captions file"),
        (["--reference", empty], "holds no sound file"),
        (["--temperature", 0], "temperature is 0"),
        (["--out", "metrics.txt"], "does not end in .csv"),
        (["--device", "cuda:99"], "--device cuda:99: there is none here; torch can use cpu"),
        (["--device", "meta"], "--device meta: there is none here"),
        (["beef"], "no run id of this study starts with 'beef'"),
    ):
        evaluate("--limit", 2, *arguments).assert_refused(word)


def test_a_run_whose_weights_are_not_here_is_told_and_the_others_are_evaluated(
    trained: Root, evaluate: Command
) -> None:
    first, second = run_ids(trained)
    (trained.run(first) / "checkpoints" / "model.safetensors").unlink()
    answer = evaluate("--limit", 2, "--json")
    assert answer.status == 1
    outcomes = {run["run_id"]: run for run in json.loads(answer.out)["runs"]}
    assert outcomes[second]["outcome"] == "evaluated"
    assert "weights are not here" in outcomes[first]["reason"]
