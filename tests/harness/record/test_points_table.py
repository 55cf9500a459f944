"""The Points table comes from the journals, to the last digit and without a tracker."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from harness.record.journal import Event
from harness.record.points import COLUMNS, points_of, without_points
from harness.record.root import Root
from harness.record.scores import Evaluation, Score, keep_evaluation
from harness.tracking.store import default_uri
from harness.tracking.tracker import Tracker
from tests.conftest import Answer, Command
from tests.harness.journals import (
    begin_run,
    begin_series,
    finish,
    log_steps,
    registered,
    rows_of,
    write_finished,
)
from tests.studies import Fields


@pytest.fixture
def evaluated(tracked_root: Root, study_fields: Fields) -> Root:
    """Two Runs finished, and two evaluations on their trunk."""
    points = registered(tracked_root, study_fields).points
    trunk = begin_series(tracked_root, points[0].run)
    for step in (2, 4):
        log_steps(trunk, [step])
        books = {"loss_codebooks": [4.0, 6.0]} if step == 2 else {}  # a former version's line lacks them
        trunk.append(Event.EVAL, step=step, loss=5.0 + 1 / 3 - step / 10, tokens=step * 800, **books)
    trunk.append(Event.FINISHED)
    for point in points:
        finish(begin_run(tracked_root, point.run), point.run, loss=4.0 + 1 / 3)
    return tracked_root


def table(answer: Answer) -> list[dict[str, str]]:
    assert answer.status == 0, answer.err
    return list(csv.DictReader(io.StringIO(answer.out)))


def test_points_are_as_journalled_and_every_run_of_a_finished_study_has_one(
    evaluated: Root, study_fields: Fields
) -> None:
    rows = rows_of(evaluated, study_fields)
    assert without_points(rows) == ""
    points = list(points_of(rows, evaluated))
    assert [(point.run_id, point.iterations, point.loss) for point in points] == [
        (row.run_id, row.point.run.iterations, row.loss) for row in rows
    ]
    assert len({point.cluster for point in points}) == 1
    assert all(isinstance(point.tokens, int) and point.annealed for point in points)


def test_evaluations_during_training_are_rows_that_are_not_annealed(
    evaluated: Root, ssmscale: Command
) -> None:
    final = table(ssmscale("points", "tiny", "--root", evaluated.path))
    every = table(ssmscale("points", "tiny", "--root", evaluated.path, "--all"))
    assert [row for row in every if row["annealed"] == "True"] == final
    added = [row for row in every if row["annealed"] == "False"]
    assert [(row["iterations"], row["tokens"]) for row in added] == [("2", "1600"), ("4", "3200")]
    assert {row["run_id"] for row in added} == {row["cluster"] for row in final}
    assert [float(row["loss"]) for row in added] == [5.0 + 1 / 3 - 0.2, 5.0 + 1 / 3 - 0.4]
    assert {row["n_params"] for row in every} == {"1001"}
    rates = {float(row["flops"]) / int(row["tokens"]) for row in every}
    assert len(rates) == 1


def test_losses_of_codebooks_and_settings_of_training_are_columns(
    evaluated: Root, study_fields: Fields, ssmscale: Command
) -> None:
    every = table(ssmscale("points", "tiny", "--root", evaluated.path, "--all"))
    books = {(row["annealed"], row["iterations"]): (row["loss_q0"], row["loss_q1"]) for row in every}
    assert books["False", "2"] == ("4.0", "6.0")
    assert books["False", "4"] == ("", "")
    assert {values for (annealed, _), values in books.items() if annealed == "True"} == {
        (str(4.0 + 1 / 3),) * 2
    }
    run = rows_of(evaluated, study_fields)[0].point.run
    settings = {(float(row["lr"]), int(row["batch"]), int(row["frames"])) for row in every}
    assert settings == {(run.optimiser.lr, run.batch, run.frames)}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_files_hold_the_same_table(evaluated: Root, ssmscale: Command, tmp_path: Path, ending: str) -> None:
    import pandas as pd

    shown = ssmscale("points", "tiny", "--root", evaluated.path, "--all")
    out = tmp_path / f"points.{ending}"
    assert ssmscale("points", "tiny", "--root", evaluated.path, "--all", "--out", out).status == 0
    read = pd.read_csv(out) if ending == "csv" else pd.read_parquet(out)
    assert list(read.columns) == [*COLUMNS, "loss_q0", "loss_q1"]
    pd.testing.assert_frame_equal(read, pd.read_csv(io.StringIO(shown.out)))


def test_another_suffix_is_refused_before_anything_is_read(evaluated: Root, ssmscale: Command) -> None:
    said = ssmscale("points", "tiny", "--root", evaluated.path, "--out", "points.xlsx")
    said.assert_refused("points.xlsx")
    assert said.out == ""


def test_without_a_tracker_points_are_the_same_and_sync_fails_each_with_one_sentence(
    evaluated: Root, ssmscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tracker = ssmscale("points", "tiny", "--root", evaluated.path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    without = ssmscale("points", "tiny", "--root", evaluated.path)
    assert (without.status, without.out) == (0, with_tracker.out)
    assert len(without.err.splitlines()) == 1
    assert "http://127.0.0.1:9" in without.err
    sync = ssmscale("sync", "tiny", "--root", evaluated.path)
    assert (sync.status, len(sync.err.splitlines())) == (1, 1)
    assert "the journals keep everything" in sync.err


def test_sync_counts_the_finished_runs_and_names_skipped_lines(evaluated: Root, ssmscale: Command) -> None:
    with next((evaluated.path / "runs").glob("*/journal/0001.jsonl")).open("a") as journal:
        journal.write('{"t": 1, "event": "step", "step": "no number"}\n')
    said = ssmscale("sync", "tiny", "--root", evaluated.path)
    assert said.status == 0, said.err
    assert "2 finished runs are in sqlite:///" in said.out
    assert "0001.jsonl line 3" in said.err


def test_a_report_is_kept_with_the_study_and_its_run(
    tracked_root: Root, study_fields: Fields, ssmscale: Command, tmp_path: Path
) -> None:
    study_fields["grid"]["sizes"] = {f"b{k}": {"n_blocks": k, "d_model": 16} for k in range(1, 5)}
    study_fields["grid"]["iterations"] = [50, 100, 200]
    resolved = registered(tracked_root, study_fields)
    write_finished(tracked_root, resolved.points)
    point = resolved.points[0]
    evaluation = Evaluation(n_prompts=6, scores={"ce": Score(value=4.125, t=1.0)})
    keep_evaluation(tracked_root, point.run_id, evaluation)
    said = ssmscale("report", "tiny", "--root", tracked_root.path, "--out", tmp_path / "out")
    assert said.status == 0, said.err
    section = (tmp_path / "out" / "report.html").read_text(encoding="utf-8").split('id="convergence"')[1]
    table = section.split('<table id="evaluations">')[1].split("</table>")[0]
    assert table.count("</tr>") == 2
    assert all(f">{cell}<" in table for cell in (point.run_id, "ce", "4.125"))
    kept = tracked_root.study("tiny") / "report"
    for name in ("report.html", "fit.json"):
        assert (kept / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    experiment = Tracker(default_uri(tracked_root), "tiny", tracked_root).experiment
    (run,) = [one for one in experiment.search() if one.kind == "study"]
    held = {file.path for file in experiment.client.list_artifacts(run.mlflow_id)}
    assert held == {"study.json", "report.html", "fit.json"}


def test_a_series_without_a_finished_run_has_no_rows_and_its_runs_are_counted_with_the_reason(
    tracked_root: Root, study_fields: Fields
) -> None:
    points = registered(tracked_root, study_fields).points
    trunk = begin_series(tracked_root, points[0].run)
    log_steps(trunk, [1, 2])
    trunk.append(Event.EVAL, step=2, loss=5.0, tokens=1600)
    assert list(points_of(rows_of(tracked_root, study_fields), tracked_root, on_the_way=True)) == []
    with begin_run(tracked_root, points[0].run) as journal:
        journal.append(Event.FAILED, reason="the loss is not finite at step 2", kind="diverged")
    said = without_points(rows_of(tracked_root, study_fields))
    assert said.startswith("2 of the study's 2 runs have no point: 1 failed, 1 ")
    assert f"{points[0].run_id} failed (the loss is not finite at step 2)" in said
