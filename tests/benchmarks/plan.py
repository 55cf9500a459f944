"""`ssmscale plan` of ten thousand runs: the whole command in a process of its own, against its --help."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.benchmarks.measure import Row, as_time, by_turns
from tests.corpora import write_tiny_corpus
from tests.studies import tiny_study

REQUIRED = 5.0


def run(*, quick: bool) -> Iterator[Row]:
    """Yield the command's wall time for a thousand and for ten thousand runs."""
    for sizes in (5, 50):
        with tempfile.TemporaryDirectory() as name:
            yield _row(Path(name), sizes, rounds=1 if quick else 3)


def _row(folder: Path, sizes: int, rounds: int) -> Row:
    write_tiny_corpus(folder / "corpus")
    study = tiny_study(folder / "corpus")
    study["grid"] = {
        "architectures": {"prefix_simba": None, "cross_transformer": None},
        "sizes": {f"s{index}": {"n_blocks": 1, "d_model": 16 + 8 * index} for index in range(sizes)},
        "iterations": list(range(100, 1100, 100)),
        "seeds": list(range(10)),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    command = [sys.executable, "-m", "harness"]
    planned = [*command, "plan", str(path), "--root", str(folder / "runs")]
    told = json.loads(subprocess.run([*planned, "--json"], check=True, capture_output=True).stdout)
    runs = told["totals"]["runs"]
    plan, bare = by_turns(
        rounds,
        lambda: subprocess.run(planned, check=True, capture_output=True),
        lambda: subprocess.run([*command, "--help"], check=True, capture_output=True),
    )
    taken = float(sorted(plan)[len(plan) // 2])
    verdict = "" if runs < 10_000 else f": {'below' if taken < REQUIRED else 'above'} {REQUIRED:g} s"
    help_taken = float(sorted(bare)[len(bare) // 2])
    return Row(
        f"plan: {runs:,} runs, the whole command, against --help",
        as_time(taken),
        as_time(help_taken),
        f"{1e6 * taken / runs:.0f} us a run{verdict}",
    )
