"""The workers of a build as Ray Data pipelines, on the Ray to which this process is connected.

Tracks are read and decoded by CPU tasks. A pretrained codec encodes on a pool of actors, one for each GPU, or for some
of the cores where there are none; Ray Data lets no stage run far ahead of the next one. This process collects the codes
of a track and keeps them; frames for rvq are kept by the tasks themselves, on the shared disk. Ray repeats what a dead
worker did. A batch holds clips of one length of one track, as in other builds, so that the corpus is theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ssmttm.codec.base import Codes
from ssmttm.corpus import tracks
from ssmttm.corpus.build import OpenBuild
from ssmttm.corpus.manifest import ShardFacts
from ssmttm.corpus.progress import Progress
from ssmttm.corpus.source import TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.tracks import Decoded, ShardPlan, TrackRecord

BLOCK_BYTES = 2**24
"""Largest block of a pipeline: two batches of 8 clips of 10 s at 24 kHz."""
BLOCKS_A_CORE = 8
"""Blocks of items for each core: small ones end evenly, and each costs a task of a few milliseconds."""

# Rows hold JSON and bytes, which Arrow takes as they are; other objects would be pickled.
_REF, _RECORD = TypeAdapter(TrackRef), TypeAdapter(TrackRecord)
_PLAN, _WRITTEN = TypeAdapter(ShardPlan), TypeAdapter(tuple[ShardPlan, ShardFacts | None])
_END = TypeAdapter(Decoded)
Setup = tuple[BuildSpec, Path, Path, str]


@contextmanager
def ray_workers(build: OpenBuild, progress: Progress) -> Iterator[RayWorkers]:
    """Open the workers of a build on the connected Ray."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    yield RayWorkers(build, progress)


class RayWorkers:
    """Ray's workers, as those of a build."""

    def __init__(self, build: OpenBuild, progress: Progress) -> None:
        import ray

        there = ray.cluster_resources()
        self.count, self.gpus = max(1, int(there.get("CPU", 1))), int(there.get("GPU", 0))
        self._build, self._progress = build, progress
        self._setup: Setup = (build.spec, build.out, build.work, "cpu")

    def read(self, refs: Iterable[TrackRef]) -> Iterator[TrackRecord]:
        """Read tracks into the work folder; yield the record of each as it ends."""
        refs = list(refs)
        if self._build.codec is not None:
            yield from self._encode(refs)
        else:
            for done in self._run(_read, map(_REF.dump_json, refs)):
                yield _RECORD.validate_json(done)

    def write(self, plans: Iterable[ShardPlan]) -> Iterator[tuple[ShardPlan, ShardFacts | None]]:
        """Write shards; yield the facts of each as it ends, None if another build's worker is writing it."""
        for done in self._run(_write, map(_PLAN.dump_json, plans)):
            yield _WRITTEN.validate_json(done)

    def _run(self, job: Callable[..., dict[str, Any]], items: Iterable[bytes]) -> Iterator[bytes]:
        """Run a job for each item on a core each; yield its result."""
        data = self._data(items)
        if data is not None:  # a dataset would read itself to tell whether it is true
            for row in self._rows(data.map(job, fn_kwargs={"setup": self._setup}, num_cpus=1)):
                yield row["done"]

    def _encode(self, refs: Sequence[TrackRef]) -> Iterator[TrackRecord]:
        """Decode tracks, encode their batches, and keep each track whose codes are all there."""
        batches: dict[int, dict[int, Codes]] = {}
        ends: dict[int, tuple[int, Decoded]] = {}
        for row in self._rows(self._encoded(refs)) if refs else ():
            number, batch = int(row["number"]), int(row["batch"])
            if row["end"]:
                ends[number] = batch, _END.validate_json(row["end"])
            else:
                codes = np.frombuffer(row["data"], np.uint16)
                codes = codes.reshape(row["clips"], self._build.spec.codebooks, -1)
                batches.setdefault(number, {})[batch] = codes
            if number in ends and len(batches.get(number, {})) == ends[number][0]:
                count, end = ends.pop(number)
                of_track = batches.pop(number, {})
                yield tracks.keep_codes(
                    self._build.work, self._build.spec, refs[number], end, (of_track[n] for n in range(count))
                )

    def _encoded(self, refs: Sequence[TrackRef]) -> Any:
        """Return the dataset of the codes of tracks, a row for each batch and for the end of each track."""
        from ray.data import ActorPoolStrategy

        on_gpus = self._build.device != "cpu"
        pool = ActorPoolStrategy(min_size=1, max_size=max(1, self.gpus if on_gpus else self.count))
        resources = {"num_gpus": 1, "num_cpus": 0} if on_gpus else {"num_cpus": 1}
        codec = {"codec": str(self._build.out / "codec"), "device": self._build.device}
        decoded = self._data(map(_REF.dump_json, refs)).flat_map(
            _decode, fn_kwargs={"setup": self._setup}, num_cpus=1
        )
        return decoded.map(_Encode, fn_kwargs=codec, compute=pool, **resources)

    def _data(self, items: Iterable[bytes]) -> Any:
        """Return a dataset of items, None if there are none."""
        from ray.data import from_items

        rows = [{"number": number, "item": item} for number, item in enumerate(items)]
        if not rows:
            return None
        return from_items(rows, override_num_blocks=min(len(rows), BLOCKS_A_CORE * self.count))

    def _rows(self, data: Any) -> Iterator[dict[str, Any]]:
        for row in data.iter_rows():
            self._progress.pulse()
            yield row


_begun: Setup | None = None


def _begin(setup: Setup) -> None:
    """Have this process of Ray work on a build, with one thread, as all workers of builds do."""
    global _begun  # noqa: PLW0603  # processes are used again
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]

    if _begun != setup:
        threadpool_limits(limits=1)
        tracks.start_worker(*setup)
        _begun = setup


def _read(row: dict[str, Any], setup: Setup) -> dict[str, Any]:
    _begin(setup)
    return {"done": _RECORD.dump_json(tracks.read_track(_REF.validate_json(row["item"])))}


def _write(row: dict[str, Any], setup: Setup) -> dict[str, Any]:
    _begin(setup)
    return {"done": _WRITTEN.dump_json(tracks.encode_shard(_PLAN.validate_json(row["item"])))}


def _decode(row: dict[str, Any], setup: Setup) -> Iterator[dict[str, Any]]:
    """Yield a row for each batch of a track, and one for its end, whose `batch` is their number."""
    _begin(setup)
    for batch, part in enumerate(tracks.decode_track(_REF.validate_json(row["item"]))):
        place = {"number": row["number"], "batch": batch}
        if isinstance(part, Decoded):
            yield {**place, "clips": 0, "data": b"", "end": _END.dump_json(part)}
        else:
            yield {**place, "clips": len(part), "data": part.tobytes(), "end": b""}


class _Encode:
    """An actor that holds the codec on its device."""

    def __call__(self, row: dict[str, Any], codec: str, device: str) -> dict[str, Any]:
        if row["end"]:
            return row
        if not hasattr(self, "_codec"):
            import torch

            from ssmttm.codec.load import load_codec

            torch.set_num_threads(1)
            self._codec = load_codec(Path(codec), device)
        audio = np.frombuffer(row["data"], np.float32).reshape(row["clips"], -1)
        return {**row, "data": self._codec.encode(audio).tobytes()}
