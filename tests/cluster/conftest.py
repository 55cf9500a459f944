"""Servers shared by the tests that talk to them: starting one costs seconds, so each is started once."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm.devcluster.cluster import DevCluster, Shape, missing_programs
from tests.cluster.servers import Postgres, Served
from tests.cluster.slurm_study import PROFILE, Make, SlurmStudy
from tests.conftest import REPOSITORY
from tests.studies import Fields

STUDY = """\
name: served
corpus: {path: nowhere}
grid: {architectures: {prefix_simba: }, sizes: {xs: {n_blocks: 1, d_model: 16}}, iterations: [10]}
training: {batch: 8, optimiser: {lr: 1e-3}, schedule: {warmup: 2}}
"""


@pytest.fixture(scope="session")
def postgres_if_any() -> Iterator[Postgres | None]:
    """A PostgreSQL of the tests' own, where the machine has one to start."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        yield None
        return
    server = Postgres(found[-1].parent if found else Path(str(on_path)).parent)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def postgres(postgres_if_any: Postgres | None) -> Postgres:
    """A PostgreSQL of the tests' own; whoever stops it starts it again."""
    if postgres_if_any is None:
        missing("no PostgreSQL on this machine (Debian: apt-get install postgresql-15)")
    assert postgres_if_any is not None
    return postgres_if_any


def missing(reason: str) -> None:
    """Skip, but where everything is promised to be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def served_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study to name to `serve`, which needs neither its corpus nor its runs."""
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(STUDY, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def servers(
    served_study: Path, postgres_if_any: Postgres | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Served]]:
    """`ssmscale serve` on each database, started side by side."""
    held = {"sqlite": Served(tmp_path_factory.mktemp("sqlite-root"), served_study)}
    if postgres_if_any is not None:
        environment = {"SSMSCALE_DATABASE": postgres_if_any.uri}
        root = tmp_path_factory.mktemp("postgres-root")
        held["postgres"] = Served(root, served_study, environment=environment)
    for server in held.values():
        server.begin()
    try:
        for server in held.values():
            server.wait()
        yield held
    finally:
        for server in held.values():
            server.stop()


def running(server: Served) -> Served:
    """The server, started again where a test has ended it."""
    if not server.is_running:
        server.stop()
        server.start()
    return server


@pytest.fixture
def sqlite_server(servers: dict[str, Served]) -> Served:
    return running(servers["sqlite"])


@pytest.fixture
def postgres_server(servers: dict[str, Served], postgres: Postgres) -> Served:
    return running(servers["postgres"])


@pytest.fixture(params=["sqlite", "postgres"])
def mlflow_server(request: pytest.FixtureRequest) -> Served:
    """MLflow's server, once on each database."""
    server: Served = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture(scope="session")
def devcluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    """A SLURM of the tests' own: two nodes of four fake GPUs, arrays of at most fifty."""
    if absent := missing_programs():
        missing(f"no {', '.join(absent)} on this machine")
    cluster = DevCluster(tmp_path_factory.mktemp("slurm") / "cluster", Shape(max_array_size=50))
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def account(devcluster: DevCluster) -> str:
    """An account of the cluster that this user may charge; under its QOS `few` he may have three jobs at once."""
    for words in (
        "add qos few MaxSubmitJobsPerUser=3",
        "add account lab",
        "add user root account=lab",
        "modify user root where account=lab set qos=normal,few",
    ):
        command = ["sacctmgr", "--immediate", *words.split()]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **devcluster.env})
    return "lab"


@pytest.fixture
def make(devcluster: DevCluster, study_fields: Fields, tmp_path: Path) -> Iterator[Make]:
    """Make a study on the cluster; what it leaves in the queue goes with the test."""
    made: list[SlurmStudy] = []

    def make(
        fields: Fields | None = None, name: str = "slurm", code: Path = REPOSITORY, **profile: Any
    ) -> SlurmStudy:
        own = copy.deepcopy(fields or study_fields)
        study = SlurmStudy(devcluster, tmp_path / name, own, {**PROFILE, **profile}, code)
        made.append(study)
        return study

    yield make
    for study in made[:1]:
        study.slurm("scancel", "--user=root")  # by their numbers those would be refused that end just now
    if made:
        made[0].wait_until_over()
