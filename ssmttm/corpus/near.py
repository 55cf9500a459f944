"""Find tracks that sound alike: other encodings, levels, cuts and starts of one recording.

A track's fingerprint is its chroma, 12 pitch classes eight times a second, smoothed over a second. Words of it are
looked up in an index. A word says which classes sound, rise and fall now, and which sound and rise two seconds later;
of the twelve transpositions of a word the smallest is its key, so that a transposed copy has the same keys. Tracks that
share keys at one offset are compared frame by frame. n words cost O(n log n), since a frequent key names no pairs.

Chroma is robust to codecs and timbre (Mueller, Fundamentals of Music Processing, 2015, sections 3.1 and 7.1). Offsets
of matching words are counted as by Wang (An industrial-strength audio search algorithm, 2003). Copies at another tempo
are not found, and a performance rendered again in another key often is not: its likeness is about 0.7.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ssmttm.corpus.source import Array

Chroma = npt.NDArray[np.uint8]

THRESHOLD = 0.85
"""Default likeness.

Rendered chorales of Bach as MP3s of 32 kbit/s, cut and shifted, have 0.97 and more. Two settings of one melody have at
most 0.73.
"""
RATE = 8
"""Frames a second."""
_LOW, _HIGH = 65.0, 2000.0  # Hz, of the notes counted; below, FFT bins are wider than a semitone
_WINDOW = 0.5  # seconds of a window, of which sixteen a second are averaged
_FINE = 2  # windows between frames
_SMOOTH = 17  # windows that are averaged, by a Hann window: one second
_GROUP = 256  # windows analysed at once
_LATER = 2 * RATE  # frames from a word's first part to its second
_STEP = 2  # frames to each side, over which a class rises or falls
_SOUNDS, _MOVES = 50, 12  # of 255: least level of a class that sounds, least rise or fall of one that moves
_LEAST_MOVING = 10.0  # of 255, that the frames of music are away from their mean
_MOST_WORDS = 12_000_000  # in an index: 200 MB; of more a fixed part is used
_MOST_OF_A_KEY = 64  # words; a key in more of them tells no tracks apart
_FEW_WORDS = (
    1_000_000  # in an index of fewer, one shared key suffices to compare two tracks, else two at one offset
)
_BITS, _FAR, _TURNS = (
    20,
    2**19,
    16,
)  # of a track's index; more than any offset, in steps of 2; more than 12 shifts
_LEAST_FRAMES = 4 * RATE
_LEAST_SHARE = 0.5  # of the shorter track, that two have in common
_MOST_OFFSETS = 4  # of a pair of tracks that are compared


class Words(NamedTuple):
    """The words of a track: keys (n,), the frames at which they begin, and their transpositions in semitones."""

    keys: npt.NDArray[np.uint64]
    frames: npt.NDArray[np.int32]
    shifts: npt.NDArray[np.int8]


class Fingerprint:
    """The chroma of a track that comes in blocks, in memory that does not grow with its samples."""

    def __init__(self, sample_rate: int) -> None:
        self._hop = round(sample_rate / (RATE * _FINE))
        self._length = round(_WINDOW * sample_rate)
        self._window = np.hanning(self._length).astype(np.float32)
        self._n_fft = 1 << (self._length - 1).bit_length()
        bins = np.arange(1, self._n_fft // 2 + 1) * sample_rate / self._n_fft
        semitones = 12 * np.log2(bins / 440.0)
        classes = np.arange(12)
        away = (semitones[:, None] - classes + 6) % 12 - 6
        heard = ((bins > _LOW) & (bins < min(_HIGH, 0.4 * sample_rate)))[:, None]
        self._classes = (np.exp(-0.5 * (away / 0.35) ** 2) * heard).astype(np.float32)  # (bins, 12)
        self._kept = np.flatnonzero(self._classes.any(axis=1))
        self._classes = self._classes[self._kept]
        self._buffer = np.zeros(self._length // 2, np.float32)
        self._found: list[Array] = []

    def add(self, block: Array) -> None:
        """Take the next samples (n,)."""
        self._buffer = np.concatenate([self._buffer, block])
        self._analyse()

    def chroma(self) -> Chroma:
        """Return the chroma (frames, 12) of all samples: the levels of a frame have norm 255."""
        self.add(np.zeros(self._length // 2, np.float32))
        if not self._found:
            return np.zeros((0, 12), np.uint8)
        fine = np.concatenate(self._found)
        weights = np.hanning(_SMOOTH + 2)[1:-1]
        padded = np.pad(fine, ((_SMOOTH // 2, _SMOOTH // 2), (0, 0)))
        smooth = np.stack([np.convolve(padded[:, one], weights, mode="valid") for one in range(12)], axis=1)[
            ::_FINE
        ]
        norms = np.linalg.norm(smooth, axis=1, keepdims=True)
        found: Chroma = np.round(255 * smooth / np.maximum(norms, 1e-9)).astype(np.uint8)
        return found

    def _analyse(self) -> None:
        while (count := min(_GROUP, (len(self._buffer) - self._length) // self._hop + 1)) > 0:
            from scipy.fft import rfft

            strided = np.lib.stride_tricks.sliding_window_view(self._buffer, self._length)[:: self._hop][
                :count
            ]
            spectrum = np.abs(rfft(strided * self._window, n=self._n_fft, axis=1)[:, 1 + self._kept])
            # Between amplitude, where one loud note hides the others, and the logarithm, which shows a codec's noise.
            self._found.append(np.sqrt(spectrum @ self._classes).astype(np.float32))
            self._buffer = self._buffer[count * self._hop :]


def words_of(chroma: Chroma) -> Words:
    """Return the words of a track's chroma (frames, 12)."""
    level = chroma.astype(np.int16)
    if len(level) <= _LATER + 2 * _STEP:
        return Words(np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int8))
    change = np.zeros_like(level)
    change[_STEP:-_STEP] = level[2 * _STEP :] - level[: -2 * _STEP]
    lanes = np.stack([change > _MOVES, change < -_MOVES, level > _SOUNDS], axis=1)  # (frames, 3, 12)
    lanes = np.concatenate([lanes[:-_LATER], lanes[_LATER:, ::2]], axis=1)  # (words, 5, 12)
    lanes = lanes[_STEP:-_STEP]
    telling = lanes[:, :2].any(axis=(1, 2)) & (lanes.sum(axis=(1, 2)) >= 6)
    lanes, frames = lanes[telling], np.flatnonzero(telling).astype(np.int32) + _STEP
    powers = np.left_shift(np.uint64(1), np.arange(60, dtype=np.uint64))
    turned = np.stack(
        [
            np.where(np.roll(lanes, -shift, axis=2).reshape(-1, 60), powers, np.uint64(0)).sum(
                axis=1, dtype=np.uint64
            )
            for shift in range(12)
        ]
    )
    shifts = turned.argmin(axis=0)
    return Words(turned.min(axis=0), frames, shifts.astype(np.int8))


def likeness(one: Chroma, other: Chroma, offset: int, shift: int) -> float:
    """Return the correlation of two chromas where they overlap, 0 if they share too little.

    Frame t + offset of `other` is compared with frame t of `one`, moved up by `shift` semitones.
    """
    start, stop = max(0, -offset), min(len(one), len(other) - offset)
    if stop - start < max(_LEAST_FRAMES, _LEAST_SHARE * min(len(one), len(other))):
        return 0.0
    first = np.roll(one[start:stop].astype(np.float32), shift, axis=1)
    second = other[start + offset : stop + offset].astype(np.float32)
    first, second = (part - part.mean(axis=0) for part in (first, second))  # the key alone is no likeness
    moving = min(float(np.median(np.linalg.norm(part, axis=1))) for part in (first, second))
    if moving < _LEAST_MOVING:  # a drone or silence
        return 0.0
    return float((first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second)))


def near_pairs(
    load: Callable[[int], Chroma], tracks: int, threshold: float = THRESHOLD
) -> Iterator[tuple[int, int]]:
    """Yield pairs of tracks, first index before second, whose likeness is `threshold` or more.

    load: returns the chroma (frames, 12) of one of so many tracks.
    """
    for (first, second), places in _candidates(map(load, range(tracks))).items():
        one, other = load(first), load(second)
        if any(
            likeness(one, other, offset + near, shift) >= threshold
            for offset, shift in places
            for near in (0, 1, -1, 2)
        ):
            yield first, second


def _candidates(tracks: Iterable[Chroma]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return (offset, shift) at which pairs of tracks share most keys."""
    keys, frames, shifts, owners = _index(tracks)
    order = np.argsort(keys, kind="stable")
    keys, frames, shifts, owners = keys[order], frames[order], shifts[order], owners[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[starts, len(keys)])
    hits: list[npt.NDArray[np.int64]] = []
    for size in range(2, _MOST_OF_A_KEY + 1):
        rows = starts[counts == size]
        for low in range(size - 1) if len(rows) else ():
            for high in range(low + 1, size):
                one, other = rows + low, rows + high
                apart = owners[one] != owners[other]
                one, other = one[apart], other[apart]  # owners of one key rise, since the sort is stable
                if not len(one):
                    continue
                offset = (frames[other].astype(np.int64) - frames[one]) // 2 + _FAR
                shift = (shifts[other].astype(np.int64) - shifts[one]) % 12
                pair = (owners[one].astype(np.int64) << _BITS) + owners[other]
                hits.append((pair * (2 * _FAR) + offset) * _TURNS + shift)
    if not hits:
        return {}
    found, number = np.unique(np.concatenate(hits), return_counts=True)
    enough = number >= (1 if len(keys) < _FEW_WORDS else 2)
    best: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for packed, count in zip(found[enough].tolist(), number[enough].tolist(), strict=True):
        rest, shift = divmod(packed, _TURNS)
        pair, offset = divmod(rest, 2 * _FAR)
        best.setdefault(divmod(pair, 2**_BITS), []).append((count, 2 * (offset - _FAR), shift))
    return {
        pair: [(offset, shift) for _, offset, shift in sorted(places, reverse=True)[:_MOST_OFFSETS]]
        for pair, places in best.items()
    }


def _index(
    tracks: Iterable[Chroma],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32], npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Return keys, frames, shifts and owners of the words of all tracks, or of a part that the keys choose."""
    found: list[Words] = []
    owners: list[npt.NDArray[np.int32]] = []
    total, part = 0, 1
    for owner, chroma in enumerate(tracks):
        found.append(_chosen(words_of(chroma), part))
        owners.append(np.full(len(found[-1].keys), owner, np.int32))
        total += len(found[-1].keys)
        if total > _MOST_WORDS:
            part *= 2
            owners = [o[_is_chosen(words.keys, part)] for o, words in zip(owners, found, strict=True)]
            found = [_chosen(words, part) for words in found]
            total = sum(len(words.keys) for words in found)
    if not found:
        return np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int32)
    return (
        np.concatenate([words.keys for words in found]),
        np.concatenate([words.frames for words in found]),
        np.concatenate([words.shifts for words in found]),
        np.concatenate(owners),
    )


def _chosen(words: Words, part: int) -> Words:
    kept = _is_chosen(words.keys, part)
    return Words(words.keys[kept], words.frames[kept], words.shifts[kept])


def _is_chosen(keys: npt.NDArray[np.uint64], part: int) -> npt.NDArray[np.bool_]:
    """Return which keys are among one in `part`, the same ones in every track."""
    mixed = (keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)  # Fibonacci hashing
    chosen: npt.NDArray[np.bool_] = mixed % np.uint64(part) == 0
    return chosen
