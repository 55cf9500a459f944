"""An old ROOT and an old bundle, from when the packages were flat folders, give the same results as then."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harness.record.registry import resolve
from harness.record.root import Root, read_run
from harness.study.schema import load_study
from tests.conftest import REPOSITORY, Command

DATA = REPOSITORY / "tests" / "data" / "former"
DONE, CANCELLED, INTERRUPTED = 22, "cb6b3a28b341", "a08acd4bfd9d"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the study, its corpus and its ROOT, and replace the path where they were made by this folder's."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    there, here = b"/former/", f"{tmp_path}/".encode()
    for path in tmp_path.rglob("*.json*"):
        path.write_bytes(path.read_bytes().replace(there, here))
    statements = gzip.decompress((DATA / "mlflow.sql.gz").read_bytes()).replace(there, here)
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as database:
        database.executescript(statements.decode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def losses(status: dict[str, Any]) -> dict[str, float | None]:
    return {row["run_id"]: row["loss"] for row in status["runs"]}


def assert_alike(found: Any, expected: Any, rel: float) -> None:
    """Assert that two documents are equal except for the rounding of numbers."""
    if isinstance(expected, dict | list):
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_alike(found[key], expected[key], rel)
    else:
        assert found == (pytest.approx(expected, rel=rel) if isinstance(expected, float) else expected)


def margin(elsewhere: float) -> float:
    """Return the allowed difference of results: 0 on a machine of the same kind as the data's, up to rounding."""
    import torch

    here = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    return 0.0 if here == printed("machine.json") else elsewhere


def of_before(points: str) -> str:
    """Return a table of points with the columns of that version."""
    columns = (DATA / "printed" / "points.csv").read_text().partition("\n")[0].count(",") + 1
    return "".join(f"{','.join(line.split(',')[:columns])}\n" for line in points.splitlines())


def mlflow_rows() -> list[tuple[int]]:
    """Count the runs, metrics and parameters in the MLflow store."""
    with closing(sqlite3.connect("runs/mlflow.db")) as database:
        tables = ("runs", "metrics", "params")
        return [database.execute(f"SELECT count(*) FROM {table}").fetchone() for table in tables]


def test_every_run_keeps_its_id() -> None:
    root = Root(Path("runs"))
    points = resolve(load_study(Path("study.yaml")), root, "study.yaml").points
    assert [point.run_id for point in points] == list(losses(printed("printed/status.json")))
    for point in points:
        if point.run_id not in (CANCELLED, INTERRUPTED):
            assert read_run(root.run(point.run_id)) == point.run


def test_status_and_plan_find_the_same_states_and_work(ssmscale: Command) -> None:
    before = printed("printed/status.json")
    before["gpu_hours"]["used_by_shared_series"] = 0  # neither of which that version told
    for row in before["runs"]:
        row["layout_changes"] = []
    (cancelled,) = (row for row in before["runs"] if row["state"] == "cancelled")
    # That version showed those of the trunk of a longer run.
    cancelled |= {"train_loss": None, "tokens_per_second": None}
    assert ssmscale("status", "former", "--json").document == before
    plan, before = ssmscale("plan", "study.yaml", "--json").document, printed("printed/plan.json")
    assert [run["state"] for run in plan["runs"]].count("done") == DONE
    for part in ("runs", "sizes"):
        assert_alike(plan[part], before[part], rel=1e-9)


def test_points_are_the_same_and_not_sent_to_mlflow_again(ssmscale: Command) -> None:
    held = mlflow_rows()
    said = ssmscale("points", "former")
    assert (said.status, of_before(said.out)) == (0, (DATA / "printed" / "points.csv").read_text())
    assert mlflow_rows() == held


def test_a_fit_is_the_same(ssmscale: Command) -> None:
    found = ssmscale("fit", "former", "--delta", "0.001", "--json").document
    before = printed("printed/fit.json")
    assert (found["law"], found["huber_delta"]) == (before["law"], before["huber_delta"])
    for name, one in before["architectures"].items():
        for key in ("params", "objective", "n_points", "n_runs", "n_clusters", "status"):
            assert_alike(found["architectures"][name][key], one[key], rel=margin(0.05) or 1e-9)


def test_the_interrupted_series_is_continued_to_the_same_losses(ssmscale: Command) -> None:
    said = ssmscale("submit", "study.yaml", "--on", "local")
    assert (said.status, "1 run to train in 1 series" in said.out) == (0, True), said.err
    status, expected = ssmscale("status", "former", "--json").document, printed("continued/status.json")
    assert status["counts"] == expected["counts"] == {"done": DONE + 1, "cancelled": 1}
    found, before = losses(status), losses(expected)
    assert found.pop(INTERRUPTED) == pytest.approx(before.pop(INTERRUPTED), rel=0, abs=margin(1e-3) or 1e-6)
    assert found == before


def test_the_bundle_is_imported_with_its_points(folder: Path, empty_store: Path, ssmscale: Command) -> None:
    (folder / "imported").mkdir()
    shutil.copy(empty_store, folder / "imported")
    said = ssmscale("import", "bundle.zip", "--root", "imported")
    assert (said.status, f"{DONE} runs imported" in said.out) == (0, True), said.err
    points = ssmscale("points", "former", "--root", "imported")
    assert of_before(points.out) == (DATA / "printed" / "points.csv").read_text()
