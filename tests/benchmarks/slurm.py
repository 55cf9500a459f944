"""A thousand runs on a real SLURM: `plan`, `submit` while the partition is down, `status` and `cancel`.

It measures the whole command, in a process of its own. Wrappers count the calls of SLURM's programs; their baseline is
a job for each Series.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.record.registry import resolve_registered
from slurm.devcluster.cluster import DevCluster, missing_programs
from tests.benchmarks.measure import Row, as_ratio, as_time
from tests.cluster.slurm_study import SlurmStudy, held_back
from tests.corpora import write_tiny_corpus
from tests.harness.journals import write_finished
from tests.programs import count_calls
from tests.studies import tiny_study

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
    """Yield rows for a thousand Series of one run, and for as many runs in two hundred Series."""
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
    target = bench.study.target()
    planned, _ = bench.command("plan", *target[2:])
    with held_back(bench.study.slurm):
        submitted, calls = bench.command("submit", *target, "--yes")
        what = f"{bench.runs} runs, {bench.series} series"
        yield Row(f"slurm: plan {what}", as_time(planned), "-", "-")
        yield Row(f"slurm: submit {what}", as_time(submitted), "-", "-")
        yield Row(
            f"slurm: sbatch for {len(RANKS)} shapes",
            f"{calls.count('sbatch')} calls",
            f"{bench.series} calls",
            as_ratio(bench.series / calls.count("sbatch")),
        )
        seconds, calls = bench.status(queued=bench.runs)
        yield Row(f"slurm: status, all wait ({' '.join(calls)})", as_time(seconds), "-", "-")
        half = bench.write_journals()
        seconds, calls = bench.status(queued=bench.runs - half)
        yield Row(f"slurm: status, {half} with {STEPS} steps ({' '.join(calls)})", as_time(seconds), "-", "-")
        cancelled, calls = bench.command("cancel")
        yield Row(f"slurm: cancel all ({' '.join(calls)})", as_time(cancelled), "-", "-")


class _Bench:
    """A study on the cluster, and a counter of the calls of SLURM's programs."""

    def __init__(self, cluster: DevCluster, folder: Path, seeds: int, iterations: Sequence[int]) -> None:
        self.series = len(RANKS) * seeds
        self.runs = self.series * len(iterations)
        fields = tiny_study(folder.parent / "corpus")
        fields["grid"] |= {
            "sizes": {
                size: {"n_blocks": int(size[1:]), "d_model": 16, "resources": {"ranks": ranks}}
                for size, ranks in RANKS.items()
            },
            "iterations": list(iterations),
            "seeds": list(range(seeds)),
        }
        self.study = SlurmStudy(cluster, folder, fields, PROFILE)
        self.told = folder / "calls"
        count_calls(folder / "bin", self.told, "sbatch", "squeue", "sacct", "scontrol", "sinfo", "scancel")

    def command(self, verb: str, *options: str) -> tuple[float, list[str]]:
        """Run one verb in a process; returns its seconds and the programs of SLURM that it called."""
        self.told.write_text("", encoding="utf-8")
        path = f"{self.told.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
        begun = time.perf_counter()
        process = self.study.start(verb, *options, PATH=path)
        self.out, errors = process.communicate()
        seconds = time.perf_counter() - begun
        if process.returncode:
            raise RuntimeError(f"{verb} ended with {process.returncode}: {errors}")
        return seconds, self.told.read_text(encoding="utf-8").split()

    def status(self, *, queued: int) -> tuple[float, list[str]]:
        """Run `status`; raises AssertionError if its counts are wrong."""
        self.command("status", "--json")
        counts = json.loads(self.out)["counts"]
        if counts.get("queued") != queued or sum(counts.values()) != self.runs:
            raise AssertionError(f"status counts {counts}; {queued} of {self.runs} runs wait")
        return self.command("status")

    def write_journals(self) -> int:
        """Write the journals of every other Series, its runs finished; returns the number of those runs."""
        resolved = resolve_registered(self.study.root, self.study.fields["name"])
        assert resolved is not None
        chosen = sorted({point.series_id for point in resolved.points})[::2]
        points = [point for point in resolved.points if point.series_id in chosen]
        write_finished(self.study.root, points, STEPS)
        return len(points)
