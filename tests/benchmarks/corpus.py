"""A corpus built in two parts by two workers, against one worker: both read tracks and write shards."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssmttm.corpus.manifest import load_manifest
from ssmttm.corpus.spec import BuildSpec
from tests.benchmarks.measure import Row, times

RATE = 44_100
WORKER = """
import sys
from pathlib import Path
import sklearn.cluster, soundfile, soxr  # before the clock starts
from ssmttm.corpus.build import OpenBuild, build_part, local_workers
from ssmttm.corpus.parts import Share
from ssmttm.corpus.spec import BuildSpec
if __name__ == "__main__":
    spec, out, part, of = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    build = OpenBuild(BuildSpec.model_validate_json(spec), Path(out))
    build_part(build, Share(int(part), int(of)), local_workers(1))
"""


def run(*, quick: bool) -> Iterator[Row]:
    """Yield a row for recordings that both sides read, resample and encode; the corpora must be the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _record(folder / "music", 8 if quick else 48)
        spec = BuildSpec(
            source="folder", audio=folder / "music", codebooks=1, codebook_size=64, segment_seconds=5
        )
        two, one = [], []
        for _ in range(1 if quick else 3):
            two.append(_build(spec, folder / "two", 2))
            one.append(_build(spec, folder / "one", 1))
            found = {load_manifest(folder / side).fingerprint for side in ("one", "two")}
            if len(found) > 1:
                raise RuntimeError("two workers built another corpus than one")
    yield times("corpus: two workers or one", np.array(two), np.array(one))


def _record(folder: Path, count: int) -> None:
    """Write recordings of two minutes."""
    import soundfile

    folder.mkdir()
    for number in range(count):
        steps = np.random.default_rng(number).normal(size=120 * RATE).cumsum()
        soundfile.write(folder / f"{number:02}.flac", 0.5 * np.sin(steps), RATE)
    rows = (f"{number:02}.flac,Noise number {number}.\n" for number in range(count))
    (folder / "captions.csv").write_text("path,caption\n" + "".join(rows), encoding="utf-8")


def _build(spec: BuildSpec, out: Path, parts: int) -> float:
    """Build a corpus by a process a part; returns the seconds after all have started."""
    shutil.rmtree(out, ignore_errors=True)
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WORKER,
                spec.model_dump_json(exclude_unset=True),
                str(out),
                str(part),
                str(parts),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(parts)
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    begun = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.wait()
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a worker failed; its message stands above")
    return time.perf_counter() - begun
