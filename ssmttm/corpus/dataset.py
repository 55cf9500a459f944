"""Token shards by memory map, and the choice of clips for a training step.

The clips of a step are a pure function of (seed, step): a run that resumes after preemption, or that another backend
starts, reads the same clips with the same captions dropped. The draws use Philox's raw 64-bit stream, which numpy
promises to keep, and not its Generator methods, which it may change.
"""

import mmap
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssmttm.corpus.manifest import Clip, Manifest, ShardFacts, load_manifest
from ssmttm.errors import InputError
from ssmttm.files import MAX_LINE_BYTES, open_array, parse_json

Indices = Sequence[int] | npt.NDArray[np.integer[Any]]

_ORDER, _CAPTION, _POSITION, _CROP = 1, 2, 3, 4
_MASK_64 = (1 << 64) - 1


class TokenDataset:
    """One split of a corpus; raises InputError if a file is missing, truncated or of another shape."""

    def __init__(self, corpus: Path, split: str) -> None:
        self.corpus = Path(corpus)
        self.split = split
        self.manifest: Manifest = load_manifest(self.corpus)
        if split not in self.manifest.splits:
            raise InputError(
                f"{corpus}: no split {split!r}; it has {', '.join(sorted(self.manifest.splits))}"
            )
        facts = self.manifest.splits[split]
        self._shards = [_open_shard(self.corpus, self.manifest, shard) for shard in facts.shards]
        self._ends = np.cumsum([shard.clips for shard in facts.shards], dtype=np.int64)
        self._lines = _Lines(self.corpus / facts.captions)
        held = int(self._ends[-1]) if len(self._ends) else 0
        if held != facts.clips or len(self._lines) != facts.clips:
            raise InputError(
                f"{self.corpus}: split {split!r} should have {facts.clips} clips; its shards hold {held} and "
                f"{facts.captions} has {len(self._lines)} lines"
            )

    def __len__(self) -> int:
        return self.manifest.splits[self.split].clips

    def __reduce__(self) -> tuple[Callable[..., "TokenDataset"], tuple[Path, str]]:
        return TokenDataset, (self.corpus, self.split)  # a memory map would be pickled as a whole array

    def codes(self, indices: Indices) -> npt.NDArray[np.int64]:
        """Return codes (n, codebooks, frames) of clips; raises InputError if a shard holds an impossible code."""
        wanted = self._checked(indices)
        codec = self.manifest.codec
        out = np.empty((len(wanted), codec.n_codebooks, self.manifest.frames), dtype=np.int64)
        which = np.searchsorted(self._ends, wanted, side="right")
        for row, (shard, clip) in enumerate(zip(which, wanted, strict=True)):
            start = self._ends[shard - 1] if shard else 0
            out[row] = self._shards[shard][clip - start]
        if out.size and out.max() >= codec.codebook_size:
            row = int(np.argmax(out.max(axis=(1, 2)) >= codec.codebook_size))
            file = self.manifest.splits[self.split].shards[which[row]].file
            raise InputError(
                f"{self.corpus / file}: clip {wanted[row]} has the code {out[row].max()}, but a codebook has "
                f"{codec.codebook_size} entries: the shard is damaged"
            )
        return out

    def lengths(self, indices: Indices) -> npt.NDArray[np.int64]:
        """Return the frames of music of each clip (n,); the frames after them are padding."""
        return np.array([self.clip(int(i)).frames for i in self._checked(indices)], dtype=np.int64)

    def captions(self, indices: Indices) -> list[str]:
        """Return the caption of each clip."""
        return [self.clip(int(i)).caption for i in self._checked(indices)]

    def clip(self, index: int) -> Clip:
        """Return the record of one clip; raises InputError if its line in the clips file is damaged."""
        try:
            return Clip.model_validate(parse_json(self._lines[index]))
        except ValueError as error:
            file = self.manifest.splits[self.split].captions
            raise InputError(f"{self.corpus / file}: line {index + 1} is not a clip: {error}") from None

    def _checked(self, indices: Indices) -> npt.NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"clip {wanted.min()}..{wanted.max()} of a split of {len(self)}")
        return wanted


def batch_indices(n_clips: int, seed: int, step: int, batch: int) -> npt.NDArray[np.int64]:
    """Return the clips (batch,) of a step: epoch after epoch, each a permutation by (seed, epoch)."""
    if n_clips < 1:
        raise InputError("the training split has no clips")
    places = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs, offsets = np.divmod(places, n_clips)
    out = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(n_clips, seed, int(epoch))[offsets[here]]
    return out


def caption_dropout(seed: int, step: int, batch: int, p_caption: float) -> npt.NDArray[np.bool_]:
    """Return True for each caption (batch,) of a step that is dropped."""
    return _uniform(seed, _CAPTION, step, batch) < p_caption


def position_dropout(seed: int, step: int, batch: int, positions: int, p: float) -> npt.NDArray[np.bool_]:
    """Return True for each text position (batch, positions) of a step that is dropped."""
    return (_uniform(seed, _POSITION, step, batch * positions) < p).reshape(batch, positions)


def crop_starts(seed: int, step: int, spare: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the first frame (batch,) of each clip's crop; spare: (batch,) frames of a clip outside its crop."""
    return (_uniform(seed, _CROP, step, len(spare)) * (spare + 1)).astype(np.int64)


@lru_cache(maxsize=4)
def _permutation(n_clips: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    order = np.argsort(_raw(seed, _ORDER, epoch, n_clips), kind="stable")
    order.setflags(write=False)
    return order


def _uniform(seed: int, purpose: int, step: int, count: int) -> npt.NDArray[np.float64]:
    return (_raw(seed, purpose, step, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _raw(seed: int, purpose: int, step: int, count: int) -> npt.NDArray[np.uint64]:
    # Draws advance the low words of the counter; its highest word is free for the step.
    key = np.array([seed & _MASK_64, purpose], dtype=np.uint64)
    counter = np.array([0, 0, 0, step & _MASK_64], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(count), dtype=np.uint64)


def _open_shard(corpus: Path, manifest: Manifest, facts: ShardFacts) -> npt.NDArray[np.uint16]:
    path = corpus / facts.file
    expected = (facts.clips, manifest.codec.n_codebooks, manifest.frames)
    try:
        return open_array(path, "<u2", expected, "the manifest says")
    except FileNotFoundError:
        raise InputError(f"{path}: missing, though the manifest lists it") from None


class _Lines:
    """The lines of a file by number, with only their offsets in memory."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path}: missing, though the manifest lists it")
        self._data: mmap.mmap | bytes = b""
        if path.stat().st_size:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ends = [0]
        while (found := self._data.find(b"\n", ends[-1])) >= 0:
            ends.append(found + 1)
        self._starts = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> bytes:
        start, end = self._starts[index : index + 2]
        if end - start > MAX_LINE_BYTES:
            raise ValueError(f"it is longer than {MAX_LINE_BYTES:,} bytes")
        return bytes(self._data[start:end])
