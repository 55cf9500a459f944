"""Build a corpus: read every track, fit the codec on the training split unless it is pretrained, write token shards.

A build can be stopped at any instant and started again with the same specification: tracks that are finished are
not read again, and the result has the same fingerprint as that of a build never stopped, whatever the number of
workers. A finished corpus is returned as it is; one that another specification made is never touched.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, JsonValue

from ssmttm.codec.base import CODEC_FILE
from ssmttm.corpus.manifest import MANIFEST, Manifest, load_manifest
from ssmttm.corpus.packages import installed_version
from ssmttm.corpus.pool import Pool
from ssmttm.corpus.progress import Progress, Silent
from ssmttm.corpus.source import Source
from ssmttm.corpus.spec import RECIPE, BuildSpec, differences
from ssmttm.corpus.split import limited, split_tracks
from ssmttm.corpus.stages import clip_lines, encode, fit_codec, pretrained_codec, read_tracks, usable_tracks
from ssmttm.corpus.tracks import make_source, start_worker
from ssmttm.corpus.writer import write_clips, write_manifest
from ssmttm.errors import InputError
from ssmttm.files import write_atomically

if TYPE_CHECKING:
    from ssmttm.codec.neural import NeuralCodec

REPORT = "build.json"
_WORK = ".work"
_WORKERS_A_GPU = 2  # each holds the codec and its activations there; one reads audio while the other encodes


class BuildReport(BaseModel):
    """What a build cost; written beside the manifest, and no part of the corpus's identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int
    seconds: dict[str, float]
    """Wall seconds of each stage."""
    parent_peak_mib: float
    """Peak memory of the process that called, whatever else it has done."""
    worker_peak_mib: float
    """Peak memory of the largest worker; 0 when the calling process did the work."""


def build_corpus(
    spec: BuildSpec,
    out: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Manifest:
    """Build the corpus of a specification at `out`, or return it when it is there already.

    device: where a pretrained codec computes, `cpu` or `cuda`. Raises InputError when the source or the codec's model
    is wrong, when `out` holds something else, or when the corpus there was made by another specification (the message
    says what differs); RuntimeError when a worker dies. With several workers the caller's main module must be
    importable (`if __name__ == "__main__":`), since they are spawned.
    """
    codec = pretrained_codec(spec, device)
    if codec is not None:
        spec = spec.settled(codec.facts)
    source = make_source(spec)
    recipe = _recipe(spec, source, codec)
    if (out / MANIFEST).exists():
        return _finished(recipe, out)
    work = out / _WORK
    if out.exists() and not work.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not a corpus; choose another place or empty it")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            if (out / MANIFEST).exists():  # another build finished it while this one asked for the lock
                return _finished(recipe, out)
            recipe["made_with"] = _made_with(source, codec)
            _claim(recipe, out)
            share = workers or (_cores() if device == "cpu" else min(_cores(), _WORKERS_A_GPU))
            job = _Job(spec, source, out, share, progress or Silent(), codec, recipe)
            manifest = _build(job)
    except Timeout:
        raise InputError(f"{out}: another build is writing it; wait for it to end or stop it") from None
    shutil.rmtree(work, ignore_errors=True)
    return manifest


@dataclass(frozen=True)
class _Job:
    """A build that has been checked and may begin."""

    spec: BuildSpec
    source: Source
    out: Path
    workers: int
    progress: Progress
    pretrained: NeuralCodec | None
    recipe: dict[str, JsonValue]


def _build(job: _Job) -> Manifest:
    spec, source, out, progress = job.spec, job.source, job.out, job.progress
    work = out / _WORK
    seconds: dict[str, float] = {}
    device = job.pretrained.device if job.pretrained else "cpu"
    with _timed(seconds, "all"):
        refs, unused = source.tracks()
        if job.pretrained and not (out / "codec" / CODEC_FILE).exists():
            job.pretrained.save(out / "codec")
        with Pool(job.workers, start_worker, (spec, out, work, device)) as pool:
            with _timed(seconds, "read tracks"):
                records = read_tracks(pool, limited(refs, spec), work, progress)
            usable, skipped = usable_tracks(records, spec)
            splits = split_tracks(usable, spec)
            with _timed(seconds, "fit codec"):
                codec = job.pretrained or fit_codec(out / "codec", work, splits["train"], spec, progress)
            with _timed(seconds, "write shards"):
                shards = encode(pool, splits, spec, progress)
        described = {
            split: write_clips(out, split, clip_lines(tracks, spec), shards[split])
            for split, tracks in splits.items()
        }
    parent, worker = _peak_mib()
    report = BuildReport(workers=job.workers, seconds=seconds, parent_peak_mib=parent, worker_peak_mib=worker)
    write_atomically(out / REPORT, (report.model_dump_json(indent=1) + "\n").encode())
    return write_manifest(
        out,
        name=out.resolve().name,
        source=source.name,
        codec=codec.facts,
        frames=spec.frames,
        splits=described,
        licences={record.facts.licence for record in usable if record.facts},
        skipped=sorted([*unused, *skipped], key=lambda one: one.track),
        recipe=job.recipe,
    )


def _recipe(spec: BuildSpec, source: Source, codec: NeuralCodec | None) -> dict[str, JsonValue]:
    recipe: dict[str, JsonValue] = {
        "recipe": RECIPE,
        "spec": spec.identity(),
        "source": source.identity(),
    }
    return recipe if codec is None else recipe | {"codec": codec.fingerprint}


def _made_with(source: Source, codec: NeuralCodec | None) -> dict[str, JsonValue]:
    names = ("numpy", "scipy", "scikit-learn") if codec is None else ("numpy", "torch", "transformers")
    found = source.made_with() | {name: installed_version(name) for name in names}
    # A GPU rounds otherwise than a CPU, and now and then another entry is the nearest.
    return found if codec is None else found | {"device": codec.device}


def _finished(recipe: dict[str, JsonValue], out: Path) -> Manifest:
    manifest = load_manifest(out)
    # Library versions are recorded and not compared: what is finished is known by its fingerprint.
    before = {key: value for key, value in manifest.recipe.items() if key != "made_with"}
    found = differences(before, recipe)
    if found:
        raise InputError(
            f"{out}: was built from another specification ({'; '.join(found)}); build elsewhere, or remove it"
        )
    return manifest


def _claim(recipe: dict[str, JsonValue], out: Path) -> None:
    """Write down what is being built, or check that it is what an earlier build began."""
    path = out / _WORK / "recipe.json"
    if path.exists():
        found = differences(json.loads(path.read_text(encoding="utf-8")), recipe)
        if found:
            raise InputError(
                f"{out}: holds an unfinished build from another specification ({'; '.join(found)}); finish that, "
                "build elsewhere, or remove it"
            )
    for leftover in [*out.glob(".*.tmp"), *out.glob("shards/.*.tmp"), *out.glob("codec/.*.tmp")]:
        leftover.unlink()
    write_atomically(path, json.dumps(recipe, indent=1).encode())


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _peak_mib() -> tuple[float, float]:
    """Peak resident memory of this process and of the largest of its ended children."""
    import resource  # not on every platform, so that this module can be imported on all

    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    parent, children = (
        resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return round(parent, 1), round(children, 1)
