"""`ssmscale points` on ten thousand finished runs, against reading the same table through MLflow's own search_runs.

The journals are as workers write them, and `ssmscale sync` mirrors them. It measures the wall time and the peak memory
of the whole command, in a process of its own. The stores are an SQLite file, MLflow's server on PostgreSQL, and that
PostgreSQL opened directly.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

from harness.record.root import Root
from harness.tracking.store import default_uri
from tests.benchmarks.measure import Row, as_ratio, as_time
from tests.corpora import write_tiny_corpus
from tests.harness.journals import registered, write_finished
from tests.studies import Fields, tiny_study

STEPS = 20
ITERATIONS = (50, 100, 200, 300, 400)
READ = """
import csv, sys
from harness.tracking.store import connect
client = connect(sys.argv[1])
experiment = client.get_experiment_by_name("bench")
token, rows = None, []
while True:
    page = client.search_runs(
        [experiment.experiment_id], "tags.`ssmscale.kind` = 'run'", max_results=1000, page_token=token
    )
    rows += [(run.data.tags["ssmscale.id"], repr(run.data.metrics["final.loss"])) for run in page]
    token = page.token
    if not token:
        break
csv.writer(sys.stdout).writerows(rows)
"""
"""The baseline: the same runs and losses, out of MLflow alone."""


@dataclass(frozen=True)
class Measured:
    """A process from its start to its end."""

    seconds: float
    gib: float
    """Largest resident memory."""
    out: str


def run(*, quick: bool) -> Iterator[Row]:
    """Yield rows for each store of this machine."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_tiny_corpus(folder / "corpus")
        # 2 architectures x 25 sizes x 5 lengths x seeds: 10,000 runs in 2,000 series, or 500 in 100.
        root, fields = Root(folder / "runs"), _study(folder / "corpus", seeds=2 if quick else 40)
        (folder / "study.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
        points = registered(root, fields).points
        write_finished(root, points, STEPS)
        yield from _measure("SQLite", default_uri(root), root, len(points))
        served = _served(stack, folder)
        if served is None:
            yield Row("points: PostgreSQL", "-", "-", "none on this machine")
            return
        server, database = served
        yield from _measure("PostgreSQL, served", server, root, len(points))
        yield from _measure("PostgreSQL, direct", database, root, len(points))


def _measure(store: str, uri: str, root: Root, runs: int) -> Iterator[Row]:
    command = [sys.executable, "-m", "harness"]
    where = ["bench", "--root", str(root.path)]
    synced = _process([*command, "sync", *where], uri)
    yield Row(f"sync: {runs} finished runs, {store}", as_time(synced.seconds), "-", "-")
    again = _process([*command, "sync", *where], uri)
    yield Row(f"sync: the same once more, {store}", as_time(again.seconds), "-", "-")
    ours = _process([*command, "points", *where], uri)
    baseline = _process([sys.executable, "-c", READ, uri], uri)
    table = {row["run_id"]: row["loss"] for row in csv.DictReader(io.StringIO(ours.out))}
    if table != dict(csv.reader(io.StringIO(baseline.out))) or len(table) != runs:
        raise AssertionError(f"{store}: the journals and MLflow hold other points")
    ratio = as_ratio(baseline.seconds / ours.seconds)
    yield Row(f"points: {runs} runs, {store}", as_time(ours.seconds), as_time(baseline.seconds), ratio)
    memory = as_ratio(baseline.gib / ours.gib)
    yield Row(
        f"points: peak memory, {store}",
        f"{1024 * ours.gib:.0f} MiB",
        f"{1024 * baseline.gib:.0f} MiB",
        memory,
    )


def _process(command: list[str], uri: str) -> Measured:
    """Run a command, which must succeed; time and memory are its own, without those of earlier processes."""
    with tempfile.TemporaryFile("w+") as out:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, env={**os.environ, "MLFLOW_TRACKING_URI": uri})
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{command[2]} ended with {process.returncode}")
        out.seek(0)
        return Measured(seconds, used.ru_maxrss / 2**20, out.read())


def _served(stack: ExitStack, folder: Path) -> tuple[str, str] | None:
    """Start MLflow's server on a PostgreSQL; returns both addresses, or None without a PostgreSQL."""
    from tests.cluster.servers import Postgres, Served, postgres_binaries

    binaries = postgres_binaries()
    if binaries is None:
        return None
    postgres = Postgres(binaries)
    stack.callback(postgres.remove)
    postgres.start()
    environment = {"SSMSCALE_DATABASE": postgres.uri}
    server = Served(folder / "served", folder / "study.yaml", environment=environment)
    stack.callback(server.stop)
    server.start()
    os.environ |= server.clients_environment
    return server.address, postgres.uri


def _study(corpus: Path, seeds: int) -> Fields:
    grid = {
        "architectures": {"prefix_simba": None, "cross_transformer": None},
        "sizes": {f"b{blocks}": {"n_blocks": blocks, "d_model": 16} for blocks in range(1, 26)},
        "iterations": list(ITERATIONS),
        "seeds": list(range(seeds)),
    }
    return tiny_study(corpus) | {"name": "bench", "grid": grid}
