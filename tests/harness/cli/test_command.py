"""The command end to end, as a user runs it: real workers, a real MLflow store, killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.cli.app import VERBS, load_verb
from harness.record.journal import read_progress
from harness.record.root import Root
from tests.conftest import REPOSITORY, Command, Write, files_below, poison
from tests.harness.fuzzing import refused
from tests.harness.trainer import losses, undisturbed
from tests.studies import Fields
from tests.waiting import PATIENCE, is_running, paced, wait_until

Start = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture
def start_submit(tmp_path: Path) -> Iterator[Start]:
    """Start `ssmscale submit --on local` as a process of its own, in which training is slow.

    The fixture kills it and its children: workers that a failing test has suspended do not notice its end.
    """
    started: list[subprocess.Popen[str]] = []

    def start(study: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "harness", "submit", str(study), "--on", "local"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=paced(0.02),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            for left in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    left.kill()
        process.communicate()


@pytest.fixture
def study(study_fields: Fields, write_study: Write) -> Path:
    """The YAML of a study of two runs in one series."""
    return write_study(study_fields)


@pytest.fixture
def two_series(study_fields: Fields) -> Fields:
    study_fields["grid"] |= {
        "architectures": {"prefix_simba": None, "cross_transformer": None},
        "iterations": [10, 200],
    }
    study_fields["tracking"]["log_every"] = 10
    return study_fields


def is_told_to_stop(process: psutil.Process) -> bool:
    """True if a SIGTERM waits for a suspended process; one that has ended has none."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    (waiting,) = [int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:")]
    return bool(waiting >> (signal.SIGTERM - 1) & 1)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [
        child for child in psutil.Process(process.pid).children() if "harness.train.worker" in words_of(child)
    ]


def begun(start_submit: Start, study: Path, root: Root) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Submit, and wait until its workers have gone twenty steps on; returns the process and its workers."""
    before = trunk_step(root)
    process = start_submit(study)
    wait_until(lambda: trunk_step(root) > before, on=process)
    held = workers_of(process)
    wait_until(lambda: trunk_step(root) >= before + 20, on=process, at_once=True)
    return process, held


def end(process: subprocess.Popen[str], held: list[psutil.Process], ending: signal.Signals) -> None:
    """End a submission by a signal, and wait until its workers have saved and ended."""
    for worker in held:  # so that they do not finish before they get the signal
        worker.suspend()
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(ending)
    wait_until(lambda: any(map(is_told_to_stop, held)), on=process)
    for worker in held:
        worker.resume()
    process.wait(timeout=PATIENCE)
    wait_until(lambda: not any(map(is_running, workers)))


def words_of(process: psutil.Process) -> list[str]:
    """Command line of a process; empty if it has ended, as calls of git soon do."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def trunk_step(root: Root) -> int:
    return max((read_progress(folder).step for folder in (root.path / "series").glob("*")), default=0)


def mlflow_client(root: Root) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root.path / 'mlflow.db'}")


def mlflow_runs(root: Root, name: str) -> list[Any]:
    client = mlflow_client(root)
    experiment = client.get_experiment_by_name(name)
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


def metric_steps(root: Root, run: Any, key: str) -> list[int]:
    return [metric.step for metric in mlflow_client(root).get_metric_history(run.info.run_id, key)]


def status_of(ssmscale: Command, study: object = "tiny") -> Any:
    return ssmscale("status", study, "--json").document


def test_the_folder_in_which_the_command_is_called_is_imported_by_none_of_its_processes(
    ssmscale: Command, study: Path, tmp_path: Path
) -> None:
    poison(tmp_path)
    said = ssmscale("submit", study, "--on", "local")
    assert said.status == 0, said.err
    module = [sys.executable, "-m", "harness", "status", "tiny", "--json"]
    path = os.pathsep.join(["", str(REPOSITORY)])  # an empty part stands for the folder
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": ""}
    done = subprocess.run(module, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"done": 2}
    for name in ("harness", "ssmttm"):
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported from the wrong folder')")
    build = ("--limit", 4, "--segment-seconds", 0.64, "--codebooks", 1, "--codebook-size", 8, "--workers", 2)
    said = ssmscale("data", "build", "--out", tmp_path / "corpus", *build)
    assert said.status == 0, said.err


def test_a_study_from_submission_to_points(
    study_fields: Fields, write_study: Write, ssmscale: Command, tmp_path: Path
) -> None:
    study_fields["grid"]["iterations"] = [10, 50]
    study_fields["tracking"]["log_every"] = 10
    study, root = write_study(study_fields), Root(tmp_path / "runs")
    submitted = ssmscale("submit", study, "--on", "local")
    assert submitted.status == 0, submitted.err
    assert "2 done" in submitted.out

    status = status_of(ssmscale)
    assert status["counts"] == {"done": 2}
    assert {run["iterations_done"] for run in status["runs"]} == {10, 50}

    table = ssmscale("points", "tiny").out.splitlines()
    assert len(table) == 1 + 2
    by_id = {line.split(",")[0]: line for line in table[1:]}
    for run in status["runs"]:
        assert repr(run["loss"]) in by_id[run["run_id"]]  # to the last digit, through MLflow and back

    held = mlflow_runs(root, "tiny")
    (parent,) = (run for run in held if run.data.tags["ssmscale.kind"] == "series")
    assert [run.data.tags["ssmscale.kind"] for run in held].count("run") == 2
    assert {run.info.status for run in held} == {"FINISHED"}
    assert metric_steps(root, parent, "train_loss") == [1, *range(10, 41, 10)]

    before = sorted((path, path.stat().st_mtime_ns) for path in root.path.rglob("journal/*"))
    again = ssmscale("submit", study, "--on", "local")
    assert (again.status, "2 done" in again.out) == (0, True)
    assert sorted((path, path.stat().st_mtime_ns) for path in root.path.rglob("journal/*")) == before

    plan = ssmscale("plan", "tiny", "--json").document
    assert {run["state"] for run in plan["runs"]} == {"done"}
    assert plan["totals"]["gpu_hours"] == 0 < plan["totals"]["gpu_hours_reused"]
    calibration = json.loads((root.study("tiny") / "calibration.json").read_text())
    assert {step["architecture"] for step in calibration["steps"]} == {"prefix_simba"}

    run_id = status["runs"][0]["run_id"]
    assert "held-out loss" in ssmscale("logs", "tiny", run_id[:6]).out
    assert ssmscale("logs", "tiny", "zz").status == 2


def test_a_submission_ended_in_any_way_goes_on_where_it_was_to_the_losses_of_an_undisturbed_one(
    two_series: Fields, write_study: Write, ssmscale: Command, start_submit: Start, tmp_path: Path
) -> None:
    study, root = write_study(two_series), Root(tmp_path / "runs")
    for ending in (signal.SIGKILL, signal.SIGINT):  # a SIGTERM ends it as Ctrl-C does (test_console)
        end(*begun(start_submit, study, root), ending)
        left = status_of(ssmscale)["counts"]
        assert left.get("running", 0) == left.get("queued", 0) == 0
        assert left.get("interrupted", 0) > 0

    process, held = begun(start_submit, study, root)
    held[0].kill()  # a worker takes nothing with it
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + err
    assert "\x1b" not in out  # no escape codes in a pipe
    assert re.search(r"\[4/4\] \w+ xs seed 0, \d+ iterations: loss", out)
    assert losses(root, two_series) == undisturbed(two_series)
    held_runs = mlflow_runs(root, "tiny")
    parents = [run for run in held_runs if run.data.tags["ssmscale.kind"] == "series"]
    children = [run for run in held_runs if run.data.tags["ssmscale.kind"] == "run"]
    assert (len(parents), len(children)) == (2, 4)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {run.info.run_id for run in parents}
    for run in held_runs:
        steps = metric_steps(root, run, "train_loss")
        assert len(steps) == len(set(steps))
        assert run.info.status == "FINISHED"


def test_failed_and_cancelled_runs_stay_so_until_retry_and_the_rest_of_the_study_finishes(
    study_fields: Fields, write_study: Write, ssmscale: Command
) -> None:
    study_fields["grid"]["architectures"] = {
        "prefix_simba": {"optimiser": {"lr": 1e5, "grad_clip": None}},
        "cross_transformer": None,
    }
    study = write_study(study_fields)
    runs = ssmscale("plan", study, "--json").document["runs"]
    others = [run["run_id"] for run in runs if run["architecture"] == "cross_transformer"]
    assert "2 runs cancelled" in ssmscale("cancel", study, *others).out
    first = ssmscale("submit", study, "--on", "local")
    assert first.status == 1
    assert "loss is" in first.out
    assert status_of(ssmscale)["counts"] == {"failed": 2, "cancelled": 2}
    assert ssmscale("submit", study, "--on", "local").status == 1  # neither trained again nor forgotten
    retried = ssmscale("retry", "tiny")
    assert (retried.status, "4 runs to be tried again" in retried.out) == (1, True)
    assert status_of(ssmscale)["counts"] == {"failed": 2, "done": 2}
    lines = Path("runs/studies/tiny/control.jsonl").read_text().splitlines()
    attempts = [json.loads(line)["event"] for line in lines]
    assert attempts == ["cancelled", "submitted", "retried", "submitted"]


@pytest.mark.parametrize("name", VERBS)
def test_the_list_of_verbs_repeats_the_first_paragraph_of_each_help(name: str) -> None:
    command = load_verb(name)
    assert VERBS[name].help == command.help.partition("\n\n")[0].replace("\n", " ")


@pytest.mark.parametrize(
    "arguments", [["fit"], ["fit", "tiny", "--points", "x.csv"], ["fit", "--points", "none.csv"]]
)
def test_fit_asks_for_one_table_that_is_there(ssmscale: Command, arguments: list[str]) -> None:
    assert refused(ssmscale(*arguments))


def test_the_help_of_fit_lists_every_law_and_an_unknown_one_is_refused_with_them(
    ssmscale: Command, tmp_path: Path
) -> None:
    from analysis.laws.catalogue import LAWS

    shown = ssmscale("fit", "--help").out
    assert all(re.search(rf"\b{name}\b", shown) for name in LAWS)
    (tmp_path / "p.csv").write_text("architecture,n_params,tokens,loss\nx,1e5,1e6,3\n")
    assert refused(ssmscale("fit", "--points", "p.csv", "--law", "keplan"), "keplan", *LAWS)


def test_fit_reads_a_law_from_a_file_and_chooses_among_laws(
    ssmscale: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from analysis.laws.catalogue import LAWS
    from tests.analysis.laws.test_user_law import CODE
    from tests.analysis.synthetic import SyntheticStudy

    monkeypatch.setitem(LAWS, "one_exponent", None)  # removed after the test
    del LAWS["one_exponent"]
    (tmp_path / "mylaw.py").write_text(CODE, encoding="utf-8")
    SyntheticStudy().table(0).to_csv(tmp_path / "points.csv", index=False)
    asked = ("fit", "--points", "points.csv", "--json", "--law")
    own = ssmscale(*asked, "mylaw.py:ONE_EXPONENT").document
    assert (own["law"], own["law_choice"]["asked"]) == ("one_exponent", ["one_exponent"])
    choice = ssmscale(*asked, "chinchilla,mylaw.py:ONE_EXPONENT").document["law_choice"]
    assert choice["asked"] == ["chinchilla", "one_exponent"]
    ssmscale(*asked, "mylaw.py:OTHER").assert_refused("mylaw.py has no OTHER", "ONE_EXPONENT")
    assert not (tmp_path / "__pycache__").exists()


def test_fit_predicts_what_is_asked_for_and_fits_points_taken_mid_run_on_request(
    ssmscale: Command, tmp_path: Path
) -> None:
    from tests.analysis.synthetic import SyntheticStudy

    table = SyntheticStudy().table(0)
    table.loc[table["architecture"] == "prefix_simba", "annealed"] = False
    table.drop(columns="architecture").to_csv(tmp_path / "p.csv", index=False)
    asked = ("fit", "--points", "p.csv", "--column", "architecture==any", "--predict", "12M:3200")
    for more, kind in (((), "annealed"), (("--unannealed",), "unannealed")):
        document = ssmscale(*asked, *more, "--json").document
        assert document["points"] == kind
        fit = document["architectures"]["any"]
        assert fit["n_points"] == 18
        (predicted,) = fit["predictions"]
        assert (predicted["n_params"], predicted["iterations"]) == (12e6, 3200)
        assert predicted["ci95"][0] < predicted["ci95"][1]
    shown = ssmscale(*asked).out
    assert "12M" in shown
    assert "seed 0" in shown
    assert refused(ssmscale(*asked[:-1], "12M"), "--predict 12M")


def test_a_dry_run_shows_the_plan_and_writes_nothing(study: Path, ssmscale: Command, tmp_path: Path) -> None:
    before = files_below(tmp_path)
    answer = ssmscale("submit", study, "--on", "local", "--dry-run")
    assert (answer.status, "plan of tiny" in answer.out) == (0, True)
    packed = ssmscale("submit", study, "--on", "ray", "--dry-run")
    assert (packed.status, packed.out.startswith(answer.out)) == (0, True)
    assert "2 runs in 1 series packed on a Ray of this machine: 1 node with " in packed.out
    assert files_below(tmp_path) == before
