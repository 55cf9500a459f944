"""A thousand runs on a real SLURM: planned, submitted while the partition is down, and asked after.

What is measured is the whole command, a process of its own. Calls of SLURM's
programs are counted by wrappers before the real ones; the baseline of those is a job for each Series.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from harness.record.journal import Event
from harness.record.registry import ResolvedStudy, resolve_registered
from harness.record.root import Root
from slurm.devcluster.cluster import DevCluster, missing_programs
from tests.benchmarks.measure import Row, as_ratio, as_time
from tests.corpora import write_tiny_corpus
from tests.harness.journals import begin_run, begin_series, finish, log_steps
from tests.programs import count_calls
from tests.studies import Fields, tiny_study

RANKS = {"b1": 1, "b2": 2, "b3": 4, "b4": 8}
"""Ranks by size: four shapes of resources, the last one on two nodes."""
PROFILE = {
    "name": "bench",
    "partitions": {"low": None},
    "nodes": 2,
    "gpus": 4,
    "gpu_memory_gib": 1,
    "cores": 8,
    "memory_gib": 8,
    "limits": {"array_size": 1001, "hours": 1},
}
STEPS = 40
"""Logged steps of a run that has a journal."""


def run(*, quick: bool) -> Iterator[Row]:
    """Rows for a thousand Series of one run, and for as many runs in two hundred Series."""
    if absent := missing_programs():
        yield Row("slurm: a cluster on this machine", "-", "-", f"no {', '.join(absent)}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_corpus(folder / "corpus")
        cluster = DevCluster(folder / "cluster")
        cluster.up()
        try:
            seeds = 25 if quick else 250
            yield from _measure(_Bench(cluster, folder / "alone", seeds, (100,)))
            yield from _measure(_Bench(cluster, folder / "trunks", seeds // 5, (50, 100, 150, 200, 250)))
        finally:
            cluster.down()


def _measure(bench: _Bench) -> Iterator[Row]:
    planned, _ = bench.command("plan", str(bench.study), "--cluster", str(bench.profile))
    with bench.partition_down():
        submitted, calls = bench.command(
            "submit", str(bench.study), "--on", "slurm", "--cluster", str(bench.profile), "--yes"
        )
        what = f"{bench.runs} runs, {bench.series} series"
        yield Row(f"slurm: plan {what}", as_time(planned), "-", "-")
        yield Row(f"slurm: submit {what}", as_time(submitted), "-", "-")
        needed = len(RANKS)
        yield Row(
            f"slurm: sbatch for {needed} shapes",
            f"{calls.count('sbatch')} calls",
            f"{bench.series} calls",
            as_ratio(bench.series / calls.count("sbatch")),
        )
        seconds, calls = bench.status(queued=bench.runs)
        yield Row(f"slurm: status, all wait ({' '.join(calls)})", as_time(seconds), "-", "-")
        half = bench.write_journals()
        seconds, calls = bench.status(queued=bench.runs - half)
        yield Row(f"slurm: status, {half} with {STEPS} steps ({' '.join(calls)})", as_time(seconds), "-", "-")
        cancelled, calls = bench.command("cancel", "bench")
        yield Row(f"slurm: cancel all ({' '.join(calls)})", as_time(cancelled), "-", "-")


@dataclass
class _Bench:
    """A study on the cluster."""

    cluster: DevCluster
    folder: Path
    seeds: int
    iterations: tuple[int, ...]

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.study, self.profile = self.folder / "study.yaml", self.folder / "profile.yaml"
        self.study.write_text(yaml.safe_dump(self._fields()), encoding="utf-8")
        self.profile.write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
        self.root = Root(self.folder / "runs")
        self.told = self.folder / "calls"
        count_calls(
            self.folder / "bin", self.told, "sbatch", "squeue", "sacct", "scontrol", "sinfo", "scancel"
        )

    @property
    def series(self) -> int:
        return len(RANKS) * self.seeds

    @property
    def runs(self) -> int:
        return self.series * len(self.iterations)

    def command(self, *words: str) -> tuple[float, list[str]]:
        """Seconds of one verb from the start of its process to its end, and SLURM's programs that it called."""
        self.told.write_text("", encoding="utf-8")
        environment = {
            **os.environ,
            **self.cluster.env,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        command = [sys.executable, "-m", "harness", *words, "--root", str(self.root.path)]
        with tempfile.TemporaryFile("w+") as out:
            begun = time.perf_counter()
            done = subprocess.run(command, stdout=out, env=environment, check=False)
            seconds = time.perf_counter() - begun
            if done.returncode:
                raise RuntimeError(f"{words[0]} ended with {done.returncode}")
            out.seek(0)
            self.said = out.read()
        return seconds, self.told.read_text(encoding="utf-8").split()

    def status(self, *, queued: int) -> tuple[float, list[str]]:
        """Seconds of `status`; raises AssertionError where it counts other runs than there are."""
        self.command("status", "bench", "--json")
        counts = json.loads(self.said)["counts"]
        if counts.get("queued") != queued or sum(counts.values()) != self.runs:
            raise AssertionError(f"status counts {counts}; {queued} of {self.runs} runs wait")
        return self.command("status", "bench")

    def write_journals(self) -> int:
        """Journals for every other Series, its runs finished; returns how many runs have one."""
        resolved = self._resolved()
        chosen = sorted({point.series_id for point in resolved.points})[::2]
        written, begun = 0, set[str]()
        for point in resolved.points:
            if point.series_id not in chosen:
                continue
            if point.series_id not in begun:
                begun.add(point.series_id)
                with begin_series(self.root, point.run) as trunk:
                    log_steps(trunk, range(1, STEPS + 1))
                    trunk.append(Event.FINISHED)
            journal = begin_run(self.root, point.run)
            log_steps(journal, range(point.run.iterations - STEPS + 1, point.run.iterations + 1))
            finish(journal, point.run)
            written += 1
        return written

    @contextmanager
    def partition_down(self) -> Iterator[None]:
        """Jobs wait during the block, and none is run."""
        self._scontrol("down")
        try:
            yield
        finally:
            self._scontrol("up")

    def _scontrol(self, state: str) -> None:
        command = ["scontrol", "update", "partitionname=low", f"state={state}"]
        subprocess.run(command, env={**os.environ, **self.cluster.env}, check=True)

    def _resolved(self) -> ResolvedStudy:
        found = resolve_registered(self.root, "bench")
        assert found is not None
        return found

    def _fields(self) -> Fields:
        fields = tiny_study(self.folder.parent / "corpus")
        fields["name"] = "bench"
        fields["grid"] |= {
            "sizes": {
                size: {"n_blocks": int(size[1:]), "d_model": 16, "resources": {"ranks": ranks}}
                for size, ranks in RANKS.items()
            },
            "iterations": list(self.iterations),
            "seeds": list(range(self.seeds)),
        }
        return fields
