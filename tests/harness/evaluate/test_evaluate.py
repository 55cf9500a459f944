"""`ssmscale evaluate` measures every finished run once, whatever interrupts it."""

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
from harness.evaluate.evaluator import Evaluator, held_out_scores
from harness.evaluate.model import load_trained
from harness.evaluate.request import Request
from harness.record.journal import read_progress
from harness.record.registry import ResolvedStudy
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
def evaluate(ssmscale: Command, trained: Root) -> Command:
    """`ssmscale evaluate` of the study."""
    return lambda *words: ssmscale("evaluate", "tiny", *words, "--root", trained.path)


@pytest.fixture
def study(trained: Root, study_fields: Fields) -> ResolvedStudy:
    return registered(trained, study_fields)


@pytest.fixture
def run_ids(study: ResolvedStudy) -> list[str]:
    return [point.run.run_id for point in study.points]


def files_of(root: Root, run_id: str, ending: str = "npz") -> dict[str, int]:
    """Return the files of a run's evaluation with their times."""
    folder = evaluation_folder(root, run_id)
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob(f"*.{ending}")}


def test_each_run_is_scored_against_held_out_clips_and_not_a_second_time(
    trained: Root, study: ResolvedStudy, run_ids: list[str]
) -> None:
    request = Request(limit=6, batch=4)
    first = Evaluator.of(study, request)
    assert [first.evaluate(run).outcome for run in run_ids] == ["evaluated", "evaluated"]
    rows = evaluation_rows(study)
    scored = {(row.run_id, row.metric): row for row in rows if row.settings == first.settings.digest}
    (proxy,) = {metric for _, metric in scored}
    assert proxy.startswith("fd_mel_proxy-")
    assert all(row.value > 0 and row.n_prompts == 6 for row in scored.values())
    assert {row.metric for row in rows if row.settings == "held-out"} == {
        *("ce", "ce_0", "ce_1", "ppl", "ppl_0", "ppl_1")
    }
    before = files_of(trained, run_ids[0], "*")
    again = Evaluator.of(study, request)
    assert [again.evaluate(run).outcome for run in run_ids] == ["kept", "kept"]
    assert files_of(trained, run_ids[0], "*") == before
    assert evaluation_rows(study) == rows


class Killed(BaseException):
    pass


def test_an_evaluation_that_was_killed_repeats_no_finished_batch(
    trained: Root, study: ResolvedStudy, run_ids: list[str]
) -> None:
    run, request, messages = run_ids[0], Request(limit=6, batch=2), list[str]()

    def kill(message: str) -> None:
        messages.append(message)
        if "generating, 4 of 6" in message:
            raise Killed

    with pytest.raises(Killed):
        Evaluator.of(study, request, kill).evaluate(run)
    made = files_of(trained, run)
    assert len(made) == 2
    assert Evaluator.of(study, request, messages.append).evaluate(run).outcome == "evaluated"
    assert made.items() <= files_of(trained, run).items()
    assert [message.split(", ")[1] for message in messages if "generating" in message] == [
        *("0 of 6 prompts", "2 of 6 prompts", "4 of 6 prompts", "4 of 6 prompts")
    ]
    (resumed,) = codes_of(trained, run)
    shutil.rmtree(evaluation_folder(trained, run))
    Evaluator.of(study, replace(request, batch=6)).evaluate(run)
    (whole,) = codes_of(trained, run)
    assert np.array_equal(resumed, whole)


def codes_of(root: Root, run_id: str) -> list[np.ndarray]:
    """Return the generated codes of a run (prompts, codebooks, frames), an entry per setting."""
    return [RowStore(path).read()["codes"] for path in evaluation_folder(root, run_id).glob("*/codes")]


def test_a_measure_added_later_needs_no_generation(
    trained: Root, study: ResolvedStudy, run_ids: list[str], tmp_path: Path
) -> None:
    run = run_ids[0]
    Evaluator.of(study, Request(limit=4)).evaluate(run)
    before = files_of(trained, run)
    clap, tagger = write_tiny_clap(tmp_path / "clap"), write_tiny_ast(tmp_path / "ast")
    later = Evaluator.of(study, Request(limit=4, clap=str(clap), tagger=str(tagger)))
    ended = later.evaluate(run)
    assert any("4 clips for 16 dimensions" in note for note in ended.notes)
    assert before.items() <= files_of(trained, run).items()
    metrics = {row.metric.split("-")[0] for row in evaluation_rows(study)}
    assert {"fd_mel_proxy", "fd_clap", "clap_score", "kl_softmax_ast"} <= metrics
    assert later.skipped == {}
    assert later.evaluate(run).outcome == "kept"


def test_damaged_codes_and_arrays_are_named_and_made_again(
    trained: Root, study: ResolvedStudy, run_ids: list[str], evaluate: Command
) -> None:
    run = run_ids[0]
    Evaluator.of(study, Request(limit=4)).evaluate(run)
    before, codes = evaluation_rows(study), codes_of(trained, run)
    damaged = sorted(evaluation_folder(trained, run).rglob("*.npz"))
    damaged += sorted((trained.path / "evaluation").rglob("*.npz"))
    assert len(damaged) == 3
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-30])
    for path in evaluation_folder(trained, run).glob("*.json"):
        path.unlink()
    answer = evaluate(run, "--limit", 4, "--json")
    assert [one["outcome"] for one in answer.document["runs"]] == ["evaluated"]
    for path in damaged:
        assert answer.err.count(f"warning: {path}: was damaged (") == 1
    assert evaluation_rows(study) == before
    assert np.array_equal(codes_of(trained, run), codes)


def test_a_full_disk_is_named_and_finished_scores_are_kept(
    trained: Root, study: ResolvedStudy, run_ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run, request = run_ids[0], Request(limit=2)
    with monkeypatch.context() as patched:
        patched.setattr("ssmttm.evaluation.row_store.write_atomically", full)
        with pytest.raises(DiskFull, match=f"{run}/evaluation: its disk is full"):
            Evaluator.of(study, request).evaluate(run)
    kept = files_of(trained, run, "json")
    assert list(kept) == ["held-out.json"]
    assert Evaluator.of(study, request).evaluate(run).outcome == "evaluated"
    assert kept.items() <= files_of(trained, run, "json").items()


def test_two_processes_do_not_evaluate_one_run_at_once(
    trained: Root, study: ResolvedStudy, run_ids: list[str]
) -> None:
    evaluator = Evaluator.of(study, Request(limit=2))
    evaluation_folder(trained, run_ids[0]).mkdir()
    with FileLock(evaluation_folder(trained, run_ids[0]) / "lock"):
        assert [evaluator.evaluate(run).outcome for run in run_ids] == ["busy", "evaluated"]


# -- prompts and references of the user's own


def test_prompts_are_paired_with_the_recordings_they_name(
    study: ResolvedStudy, run_ids: list[str], tmp_path: Path
) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for number in range(2):
        tone = np.sin(np.arange(24000) * 0.05 * (number + 1))
        soundfile.write(recordings / f"clip{number}.wav", tone, 24000)
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("ytid,caption\nclip1,A tone\ngone,Silence\nclip0,A lower tone\n", encoding="utf-8")
    judge = str(write_tiny_ast(tmp_path / "ast"))
    paired = Evaluator.of(study, Request(prompts=prompts, reference=recordings, tagger=judge))
    assert paired.prompts.captions == ("A tone", "A lower tone")
    assert paired.evaluate(run_ids[0]).outcome == "evaluated"
    assert any("left out: 1 prompt without a recording" in note for note in paired.notes)
    assert any(row.metric.startswith("kl_softmax_ast") for row in evaluation_rows(study))
    loose = Evaluator.of(study, Request(prompts=prompts, tagger=judge))
    assert "kl_softmax_ast" in loose.skipped
    assert loose.settings.digest != paired.settings.digest


# -- the command


def test_the_command_evaluates_a_study_and_mirrors_it(
    trained: Root, run_ids: list[str], tmp_path: Path, evaluate: Command
) -> None:
    out = tmp_path / "metrics.csv"
    for _ in range(2):
        document = evaluate("--limit", 2, "--json", "--out", out).document
    assert [run["outcome"] for run in document["runs"]] == ["kept", "kept"]
    assert set(document["skipped"]) == {"fd_clap", "clap_score", "kl_softmax_ast"}
    table = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [float(row["value"]) for row in table] == [row["value"] for row in document["rows"]]
    (settings,) = set(document["settings"]) - {"held-out"}
    iterations = {row["run_id"]: row["iterations"] for row in document["rows"]}
    for run_id in run_ids:
        mine = {row["metric"]: float(row["value"]) for row in table if row["run_id"] == run_id}
        assert len(mine) == 7
        for metric, value in mine.items():
            place = "held-out" if metric.startswith(("ce", "ppl")) else settings
            assert history(trained, run_id, metric, place) == [(iterations[run_id], value)]


def test_a_note_of_imported_scores_moves_no_cursor(
    trained: Root, run_ids: list[str], evaluate: Command
) -> None:
    command = (run_ids[0], "--limit", 1)
    assert evaluate(*command).status == 0
    (path,) = evaluation_folder(trained, run_ids[0]).glob("[0-9a-f]*[0-9a-f].json")
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"notes": ["few\x1b[2Jclips"]}))
    assert "note: few [2Jclips" in evaluate(*command).err


def test_an_unreachable_tracker_costs_a_warning_and_receives_the_scores_from_sync(
    trained: Root,
    study: ResolvedStudy,
    run_ids: list[str],
    monkeypatch: pytest.MonkeyPatch,
    evaluate: Command,
    ssmscale: Command,
) -> None:
    run = run_ids[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    answer = evaluate(run, "--limit", 2)
    assert answer.status == 0
    assert "warning: MLflow at http://127.0.0.1:9" in answer.err
    assert "codec-decoded held-out clips" in answer.out
    assert "not measured: fd_clap: name a CLAP model" in answer.out
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert ssmscale("sync", "tiny", "--root", trained.path).status == 0
    (row,) = [row for row in evaluation_rows(study) if row.metric == "ce"]
    assert history(trained, run, "ce") == [(row.iterations, row.value)]


def history(root: Root, run_id: str, metric: str, settings: str = "held-out") -> list[tuple[int, float]]:
    """Return MLflow's steps and values of one metric."""
    experiment = Tracker(default_uri(root), "tiny", root).experiment
    (held,) = experiment.search(ID, run_id)
    found = experiment.client.get_metric_history(held.mlflow_id, f"eval/{settings}/{metric}")
    return [(one.step, one.value) for one in found]


def test_a_score_that_is_added_later_is_sent_and_no_other_twice(
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
            assert history(tracked_root, run, name, SETTINGS.digest) == [(iterations, value)]


def test_mistakes_are_named(tmp_path: Path, evaluate: Command) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, word in (
        (["--clap", tmp_path / "no-clap"], "--clap"),
        (["--prompts", tmp_path / "no.csv"], "no such captions file"),
        (["--reference", empty], "holds no sound file"),
        (["--temperature", 0], "temperature is 0"),
        (["--out", "metrics.txt"], "the name must end in .csv"),
        (["--out", "/proc/metrics.csv"], "nothing can be written in /proc"),
        (["--device", "cuda:99"], "--device cuda:99: no such device here; torch can use cpu"),
        (["beef"], "no run id of this study starts with 'beef'"),
    ):
        evaluate("--limit", 2, *arguments).assert_refused(word)


def test_a_run_without_weights_is_named_and_the_others_are_evaluated(
    trained: Root, run_ids: list[str], evaluate: Command
) -> None:
    first, second = run_ids
    (trained.run(first) / "checkpoints" / "model.safetensors").unlink()
    answer = evaluate("--limit", 2, "--json")
    assert answer.status == 1
    outcomes = {run["run_id"]: run for run in json.loads(answer.out)["runs"]}
    assert outcomes[second]["outcome"] == "evaluated"
    assert f"the weights of run {first} are missing" in outcomes[first]["reason"]
