"""Build a corpus: read every track, fit the codec on the training split unless it is pretrained, write token shards.

A build can be stopped at any instant and started again with the same specification: finished tracks are not read
again, and the corpus has the same fingerprint as that of an uninterrupted build, for any number of workers. A build
returns a finished corpus unchanged, and never touches a corpus of another specification.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout
from pydantic import JsonValue

from ssmttm.codec.base import CODEC_FILE
from ssmttm.corpus.manifest import MANIFEST, Manifest, load_manifest
from ssmttm.corpus.packages import installed_version
from ssmttm.corpus.pool import Pool
from ssmttm.corpus.progress import Progress
from ssmttm.corpus.source import Source
from ssmttm.corpus.spec import RECIPE, BuildSpec, differences
from ssmttm.corpus.split import limited, split_tracks
from ssmttm.corpus.stages import clip_lines, encode, fit_codec, pretrained_codec, read_tracks, usable_tracks
from ssmttm.corpus.tracks import make_source, start_worker
from ssmttm.corpus.writer import write_clips, write_manifest
from ssmttm.errors import InputError
from ssmttm.files import parse_json, read_document, write_atomically
from ssmttm.limits import usable_cores
from ssmttm.locks import file_lock

if TYPE_CHECKING:
    from ssmttm.codec.neural import NeuralCodec

_WORK = ".work"
_WORKERS_A_GPU = 2  # each holds the codec and its activations there; one reads audio while the other encodes


def build_corpus(
    spec: BuildSpec,
    out: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Manifest:
    """Build the corpus of a specification at `out`, or return it if it is there already.

    device: `cpu` or `cuda`, where a pretrained codec computes. Raises InputError if the source or the codec's model is
    wrong, if `out` holds something else, or if another specification made the corpus there (the message names the
    differences); RuntimeError if a worker dies. With several workers the caller's main module must be importable
    (`if __name__ == "__main__":`), since they are spawned.
    """
    codec = pretrained_codec(spec, device)
    if codec is not None:
        spec = spec.settled(codec.facts)
    source = make_source(spec)
    recipe: dict[str, JsonValue] = {"recipe": RECIPE, "spec": spec.identity(), "source": source.identity()}
    if codec is not None:
        recipe["codec"] = codec.fingerprint
    if (out / MANIFEST).exists():
        return _finished(recipe, out)
    work = out / _WORK
    if out.exists() and not work.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not a corpus; choose another folder or empty it")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(work / "lock", wait=False):
            if (out / MANIFEST).exists():  # another build finished it just before this one took the lock
                return _finished(recipe, out)
            recipe["made_with"] = _made_with(source, codec)
            _claim(recipe, out)
            cores = usable_cores()
            share = workers or (cores if device == "cpu" else min(cores, _WORKERS_A_GPU))
            manifest = _build(spec, source, out, share, progress or Progress(), codec, recipe)
    except Timeout:
        raise InputError(f"{out}: another build is writing it; wait for its end or stop it") from None
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _build(
    spec: BuildSpec,
    source: Source,
    out: Path,
    workers: int,
    progress: Progress,
    pretrained: "NeuralCodec | None",
    recipe: dict[str, JsonValue],
) -> Manifest:
    work = out / _WORK
    seconds: dict[str, float] = {}  # wall seconds of each stage
    device = pretrained.device if pretrained else "cpu"
    with _timed(seconds, "all"):
        progress.stage("find tracks", 1, 0)  # captions of a million tracks take half a minute
        refs, unused = source.tracks()
        progress.advance()
        if pretrained and not (out / "codec" / CODEC_FILE).exists():
            pretrained.save(out / "codec")
        with Pool(workers, start_worker, (spec, out, work, device)) as pool:
            with _timed(seconds, "read tracks"):
                records = read_tracks(pool, limited(refs, spec), work, progress)
            usable, skipped = usable_tracks(records, spec)
            splits = split_tracks(usable, spec)
            with _timed(seconds, "fit codec"):
                codec = pretrained or fit_codec(out / "codec", work, splits["train"], spec, progress)
            with _timed(seconds, "write shards"):
                shards = encode(pool, splits, spec, progress)
        described = {
            split: write_clips(out, split, clip_lines(tracks, spec), shards[split])
            for split, tracks in splits.items()
        }
    report = {"workers": workers, "seconds": seconds} | _peak_mib()  # no part of the corpus's identity
    write_atomically(out / "build.json", (json.dumps(report, indent=1) + "\n").encode())
    return write_manifest(
        out,
        source=source.name,
        codec=codec.facts,
        frames=spec.frames,
        splits=described,
        licences={record.facts.licence for record in usable if record.facts},
        skipped=sorted([*unused, *skipped], key=lambda one: one.track),
        recipe=recipe,
    )


def _made_with(source: Source, codec: "NeuralCodec | None") -> dict[str, JsonValue]:
    names = ("numpy", "scipy", "scikit-learn") if codec is None else ("numpy", "torch", "transformers")
    found = source.made_with() | {name: installed_version(name) for name in names}
    # A GPU rounds differently from a CPU, and sometimes another entry is the nearest.
    return found if codec is None else found | {"device": codec.device}


def _finished(recipe: dict[str, JsonValue], out: Path) -> Manifest:
    manifest = load_manifest(out)
    # Library versions are recorded and not compared: a finished corpus has its fingerprint.
    before = {key: value for key, value in manifest.recipe.items() if key != "made_with"}
    found = differences(before, recipe)
    if found:
        raise InputError(
            f"{out}: was built from another specification ({'; '.join(found)}); build elsewhere, or remove it"
        )
    return manifest


def _claim(recipe: dict[str, JsonValue], out: Path) -> None:
    """Record the recipe of this build, or check that an earlier, unfinished build had the same."""
    path = out / _WORK / "recipe.json"
    if path.exists():
        found = differences(parse_json(read_document(path)), recipe)
        if found:
            raise InputError(
                f"{out}: holds an unfinished build from another specification ({'; '.join(found)}); finish that one, "
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


def _peak_mib() -> dict[str, float]:
    """Return the peak resident memory of this process and of the largest of its ended children."""
    import resource  # here, since some platforms lack it

    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    processes = {"parent_peak_mib": resource.RUSAGE_SELF, "worker_peak_mib": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(who).ru_maxrss / unit, 1) for name, who in processes.items()}
