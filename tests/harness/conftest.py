"""Fixtures of the harness's tests: trained roots, programs of SLURM on PATH, and an MLflow store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.record.journal import Journal
from harness.record.registry import ResolvedStudy
from harness.record.root import Root, write_run, write_series
from tests.conftest import Command, Write
from tests.harness import tracked
from tests.harness.bundles import exported
from tests.harness.fuzzing import Planted
from tests.harness.journals import begin_series, registered
from tests.harness.trainer import train
from tests.programs import write_program
from tests.studies import Fields, tiny_study, with_iterations

Answering = Callable[..., None]
PlanOf = Callable[..., Any]
"""The fixture `plan_of`: it takes a study's fields and options of the verb."""
SAY_WHO = (
    "import json; from harness.common.process import identify_process; "
    "print(json.dumps(identify_process()), flush=True)"
)


@pytest.fixture(params=[1, pytest.param(10, marks=pytest.mark.verify)], ids=["few", "many"])
def times(request: pytest.FixtureRequest) -> int:
    """Number by which a fuzz test multiplies its cases; `make verify` makes ten times as many as `make test`."""
    return int(request.param)


@pytest.fixture
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A document that makes a folder if it is ever executed."""
    return Planted(tmp_path_factory.mktemp("planted") / "executed")


@pytest.fixture
def tracked_root(tmp_path: Path, empty_store: Path) -> Root:
    """A ROOT with an MLflow store and nothing in it."""
    root = Root(tmp_path / "runs")
    root.path.mkdir()
    (root.path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return root


@pytest.fixture
def resolved(tmp_path: Path, study_fields: Fields) -> ResolvedStudy:
    """A registered study of two runs that are not trained, under ./runs."""
    root = Root(tmp_path / "runs")
    found = registered(root, study_fields)
    for point in found.points:
        write_run(root, point.run)
        write_series(root, point.run)
    return found


@pytest.fixture
def plan_of(write_study: Write, ssmscale: Command) -> PlanOf:
    """Return the document that `plan --json` prints of a study's fields."""
    return lambda fields, *options: ssmscale("plan", write_study(fields), *options, "--json").document


@pytest.fixture(scope="session")
def there(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """A ROOT where the runs of 5 and 10 iterations have been trained; read it, never change it."""
    root = Root(tmp_path_factory.mktemp("there") / "runs")
    fields = with_iterations(tiny_study(tiny_corpus), 5, 10)
    train(root, fields)
    registered(root, fields)
    return root.path


@pytest.fixture(scope="session")
def bundle(there: Path, tiny_corpus: Path) -> Path:
    """Those two runs in one file."""
    return exported(Root(there), with_iterations(tiny_study(tiny_corpus), 5, 10), there.parent / "tiny.zip")


@pytest.fixture
def here(tmp_path: Path) -> Root:
    return Root(tmp_path / "runs")


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answering:
    """Put a squeue on PATH that runs `first` and prints these lines; there are no accounts."""
    place = tmp_path / "bin"
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)

    def install(*lines: str, first: str = "") -> None:
        write_program(place / "squeue", f"{first}\ncat '{place}/said'")
        write_program(place / "sacct", "exit 1")
        (place / "said").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    install()
    return install


@pytest.fixture
def at_cluster(answering: Answering, tmp_path: Path) -> Callable[[str], None]:
    """Name the SLURM cluster that the programs on PATH belong to."""

    def be(name: str) -> None:
        write_program(tmp_path / "bin" / "scontrol", f"echo 'ClusterName             = {name}'")

    return be


@pytest.fixture(scope="session")
def gone() -> dict[str, Any]:
    """A process of this machine that has ended."""
    said = subprocess.run([sys.executable, "-c", SAY_WHO], capture_output=True, check=True).stdout
    return dict(json.loads(said))


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that knows one running job; returns the file in which it writes the jobs it requeues."""
    told = tmp_path / "requeued"
    program = write_program(
        tmp_path / "bin" / "scontrol",
        f'case "$1" in requeue) echo "$2" >> "{told}";; '
        f'*) echo "JobState=RUNNING Reason=None $(cat "{tmp_path}/more" 2> /dev/null)";; esac',
    )
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    return told


# -- mirroring


@pytest.fixture
def study(tracked_root: Root, study_fields: Fields) -> tracked.Study:
    """One Series and two Runs with their journals and an experiment."""
    return tracked.Study(tracked_root, study_fields)


@pytest.fixture
def trunk(study: tracked.Study) -> Journal:
    """The journal of its Series."""
    return begin_series(study.root, study.points[0].run)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> tracked.Calls:
    """Counter of the calls that go to MLflow."""
    return tracked.Calls(monkeypatch)
