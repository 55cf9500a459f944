"""The workers of a build on this machine: processes that read tracks and write shards.

A codec on a GPU is held by the building process alone. Its worker processes read and decode ahead, each at most one
batch, and have that process encode, so that the GPU waits for none of them and memory stays constant. A batch holds
clips of one length of one track: on a GPU the codes of a clip can depend on the clips beside it, and so its batch
depends on its track alone.
"""

import multiprocessing
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, Self

from ssmttm.codec.base import Audio, Codes
from ssmttm.corpus.manifest import ShardFacts
from ssmttm.corpus.pool import Pool
from ssmttm.corpus.progress import Progress
from ssmttm.corpus.source import TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.tracks import Encoder, ShardPlan, TrackRecord, encode_shard, read_track, start_worker


class Workers(Protocol):
    """Processes that do the jobs of a build, in any order; finished jobs survive their death."""

    count: int
    """Number of processes."""

    def read(self, refs: Iterable[TrackRef]) -> Iterator[TrackRecord]:
        """Read tracks into the work folder; yield the record of each as it ends."""

    def write(self, plans: Iterable[ShardPlan]) -> Iterator[tuple[ShardPlan, ShardFacts | None]]:
        """Write shards; yield the facts of each as it ends, None if another build's worker is writing it."""


class LocalWorkers:
    """Processes of this machine; a single one is the calling process."""

    def __init__(
        self,
        spec: BuildSpec,
        corpus: Path,
        work: Path,
        count: int,
        progress: Progress,
        codec: Encoder | None,
        device: str,
    ) -> None:
        """Start the processes. codec: the pretrained codec, which encodes for all of them if `device` is a GPU."""
        self.count = count
        self._server = EncoderServer(codec, count) if codec and count > 1 and device != "cpu" else None
        setup = (spec, corpus, work, device)
        if count > 1:
            self._pool = Pool(
                count, start_worker, (*setup, self._server and self._server.client()), progress.pulse
            )
        else:
            self._pool = Pool(1, start_worker, (*setup, codec, progress.pulse))

    def __enter__(self) -> Self:
        """Return the workers, which end with the block."""
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.__exit__()
        if self._server is not None:
            self._server.close()

    def read(self, refs: Iterable[TrackRef]) -> Iterator[TrackRecord]:
        """Read tracks into the work folder; yield the record of each as it ends."""
        return self._pool.run(read_track, refs)

    def write(self, plans: Iterable[ShardPlan]) -> Iterator[tuple[ShardPlan, ShardFacts | None]]:
        """Write shards; yield the facts of each as it ends, None if another build's worker is writing it."""
        return self._pool.run(encode_shard, plans)


class EncoderServer:
    """Encodes batches for other processes with a codec that this process holds."""

    def __init__(self, codec: Encoder, clients: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._codec = codec
        self._requests = context.Queue()
        self._replies = [context.Queue() for _ in range(clients)]
        self._seats = context.Queue()
        for seat in range(clients):
            self._seats.put(seat)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def client(self) -> "EncoderClient":
        """Return a client, to be passed to processes that start; as many as there are `clients` can use it."""
        return EncoderClient(self._requests, self._replies, self._seats)

    def close(self) -> None:
        """End the service, once all clients have ended."""
        self._requests.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            seat, audio = request
            try:
                answer: Codes | str = self._codec.encode(audio)
            except Exception as error:  # it is raised in the client
                answer = f"{type(error).__name__}: {error}"
            self._replies[seat].put(answer)


class EncoderClient:
    """Has another process encode."""

    def __init__(
        self,
        requests: "multiprocessing.Queue[tuple[int, Audio] | None]",
        replies: "list[multiprocessing.Queue[Codes | str]]",
        seats: "multiprocessing.Queue[int]",
    ) -> None:
        self._requests, self._replies, self._seats = requests, replies, seats
        self._seat: int | None = None

    def encode(self, audio: Audio) -> Codes:
        """Return codes (batch, codebooks, frames) of mono audio (batch, samples)."""
        if self._seat is None:
            self._seat = self._seats.get()
        self._requests.put((self._seat, audio))
        answer = self._replies[self._seat].get()
        if not isinstance(answer, str):
            return answer
        raise RuntimeError(answer)
