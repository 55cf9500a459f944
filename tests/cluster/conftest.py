"""Servers that tests share: each takes seconds to start, so each is started once, when the first test needs it."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from slurm.devcluster.cluster import DevCluster, Shape, missing_programs
from tests.cluster.servers import Postgres, Served, postgres_binaries
from tests.cluster.slurm_study import PROFILE, Make, SlurmStudy
from tests.conftest import REPOSITORY
from tests.studies import Fields

STUDY = """\
name: served
corpus: {path: nowhere}
grid: {architectures: {prefix_simba: }, sizes: {xs: {n_blocks: 1, d_model: 16}}, iterations: [10]}
training: {batch: 8, optimiser: {lr: 1e-3}, schedule: {warmup: 2}}
"""


def missing(reason: str) -> NoReturn:
    """Skip a test whose server this machine lacks; fail where CI promises that all are there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of the tests' own; a test that stops it starts it again."""
    binaries = postgres_binaries()
    if binaries is None:
        missing("no PostgreSQL on this machine (Debian: apt-get install postgresql-15)")
    server = Postgres(binaries)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def served_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study to name to `serve`, which needs neither its corpus nor its runs."""
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(STUDY, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def on_sqlite(
    served_study: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("sqlite-root")
    shutil.copy(empty_store, root)
    yield from served(Served(root, served_study))


@pytest.fixture(scope="session")
def on_postgres(
    served_study: Path, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("postgres-root")
    yield from served(Served(root, served_study, environment={"SSMSCALE_DATABASE": postgres.uri}))


@pytest.fixture(scope="session")
def on_all_addresses(
    served_study: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    root, home = tmp_path_factory.mktemp("guarded-root"), tmp_path_factory.mktemp("home")
    shutil.copy(empty_store, root)
    options = ("--host", "0.0.0.0", "--allow-host", "proxy.example.org")
    yield from served(Served(root, served_study, *options, environment={"HOME": str(home)}))


def served(server: Served) -> Iterator[Served]:
    """Start a server, and stop it in the end."""
    try:
        server.start()
        yield server
    finally:
        server.stop()


def running(server: Served) -> Served:
    """Return the server, started again where a test has ended it."""
    if not server.is_running:
        server.stop()
        server.start()
    return server


def logged_in(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Return the server, with its login in the environment of this process and of those that it starts."""
    for name, value in running(server).clients_environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def sqlite_server(on_sqlite: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """`ssmscale serve` on SQLite, with its login in the environment."""
    return logged_in(on_sqlite, monkeypatch)


@pytest.fixture
def postgres_server(on_postgres: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """`ssmscale serve` on PostgreSQL, with its login in the environment."""
    return logged_in(on_postgres, monkeypatch)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The command of a browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        missing("no chromium on this machine (Debian: apt-get install chromium)")
    return found


@pytest.fixture
def guarded(on_all_addresses: Served) -> Served:
    """`ssmscale serve` on SQLite for other machines, in a home of its own."""
    return running(on_all_addresses)


@pytest.fixture(params=["sqlite", "postgres"])
def mlflow_server(request: pytest.FixtureRequest) -> Served:
    """`ssmscale serve`, once on each database."""
    server: Served = request.getfixturevalue(f"{request.param}_server")
    return server


def started(cluster: DevCluster) -> Iterator[DevCluster]:
    """Bring a cluster up, and take it down in the end."""
    if absent := missing_programs():
        missing(f"no {', '.join(absent)} on this machine")
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def devcluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    """A SLURM of the tests' own: two nodes of four fake GPUs, arrays of at most fifty."""
    yield from started(DevCluster(tmp_path_factory.mktemp("slurm") / "cluster", Shape(max_array_size=50)))


@pytest.fixture(scope="session")
def account(devcluster: DevCluster) -> str:
    """An account that this user may charge; its QOS `few` takes three jobs of a user at once."""
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
    """Make a study on the cluster; jobs that it leaves in the queue are cancelled after the test."""
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
        study.slurm("scancel", "--user=root")  # SLURM refuses the number of a job that ends just now
        study.wait_until_over()
