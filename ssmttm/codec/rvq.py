"""Residual vector quantisation of log-mel frames: a codec fitted in seconds, with no weights to download.

Each frame is normalised by the training split's mean and deviation a band, then quantised by one k-means codebook
after another, each fitted on the residual of the ones before it. Decoding sums the entries and inverts the mel
spectrogram (mel.py). The codec is for studies of language models: its audio is good enough to judge what a model has
learnt, and well below a neural codec's.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ssmttm.codec.base import CODEC_FILE, Audio, Codes
from ssmttm.codec.facts import CodecFacts
from ssmttm.codec.mel import LogMel
from ssmttm.errors import InputError
from ssmttm.files import Frozen, canonical_json, read_arrays, write_atomically

Array = npt.NDArray[np.float32]

ARRAYS = "rvq.npz"
_ROWS = 8192  # frames quantised at once: 32 MB of distances at 1024 entries


class RvqConfig(Frozen):
    """The choices of the codec; everything else is fitted."""

    mel: LogMel
    n_codebooks: int = Field(gt=0)
    codebook_size: int = Field(gt=1, le=65535)
    seed: int = Field(ge=0)


class RvqReport(Frozen):
    """Quality of the codebooks on the frames they were fitted on."""

    frames: int
    """Training frames the codebooks were fitted on."""
    variance_explained: tuple[float, ...]
    """Share of the normalised frames' variance that the first 1, 2, ... codebooks explain."""
    entropy_bits: tuple[float, ...]
    """Entropy of each codebook's codes, context ignored; log2 of the entries at most."""


def entropy_bits(counts: npt.NDArray[np.int64]) -> float:
    """Return the entropy in bits of the distribution given by counts (entries,)."""
    used = counts[counts > 0].astype(np.float64)
    if not len(used):
        return 0.0
    p = used / used.sum()
    return float(-(p * np.log2(p)).sum()) + 0.0


@dataclass(frozen=True)
class RvqCodec:
    """A fitted codec."""

    config: RvqConfig
    mean: Array
    """(bands,)."""
    deviation: Array
    """(bands,)."""
    codebooks: Array
    """(codebooks, entries, bands), in normalised units."""
    report: RvqReport

    @classmethod
    def fit(cls, frames: Array, config: RvqConfig) -> "RvqCodec":
        """Fit a codec to log-mel frames (n, bands); the same frames give the same codec on the same machine."""
        if len(frames) < config.codebook_size:
            raise InputError(
                f"codebook_size is {config.codebook_size}, but the training split has only {len(frames)} frames; "
                "use more music or smaller codebooks"
            )
        mean = frames.mean(axis=0, dtype=np.float64).astype(np.float32)
        deviation = np.maximum(frames.std(axis=0, dtype=np.float64), 1e-3).astype(np.float32)
        residual = ((frames - mean) / deviation).astype(np.float32)
        total = float(np.square(residual, dtype=np.float64).sum()) or 1.0
        codebooks, explained, entropy = [], [], []
        for book in range(config.n_codebooks):
            entries = _kmeans(residual, config.codebook_size, config.seed + book)
            codes = _nearest(residual, entries)
            residual -= entries[codes]
            codebooks.append(entries)
            explained.append(1.0 - float(np.square(residual, dtype=np.float64).sum()) / total)
            entropy.append(entropy_bits(np.bincount(codes, minlength=config.codebook_size)))
        report = RvqReport(
            frames=len(frames), variance_explained=tuple(explained), entropy_bits=tuple(entropy)
        )
        return cls(config, mean, deviation, np.stack(codebooks), report)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the configuration and the fitted arrays."""
        digest = hashlib.sha256(canonical_json(self.config.model_dump()).encode())
        for array in (self.mean, self.deviation, self.codebooks):
            digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return digest.hexdigest()

    @property
    def facts(self) -> CodecFacts:
        """Rates, codebooks, entries and fingerprint."""
        return CodecFacts(
            name="rvq",
            fingerprint=self.fingerprint,
            sample_rate=self.config.mel.sample_rate,
            frame_rate=float(self.config.mel.frame_rate),
            n_codebooks=self.config.n_codebooks,
            codebook_size=self.config.codebook_size,
        )

    def quantise(self, frames: Array) -> Codes:
        """Return codes (codebooks, n) of log-mel frames (n, bands)."""
        out = np.empty((self.config.n_codebooks, len(frames)), dtype=np.uint16)
        residual = (frames.astype(np.float32) - self.mean) / self.deviation
        for book, entries in enumerate(self.codebooks):
            out[book] = codes = _nearest(residual, entries)
            residual -= entries[codes]
        return out

    def log_mel(self, codes: Codes) -> Array:
        """Return the log-mel frames (n, bands) of codes (codebooks, n); raises InputError for unknown codes."""
        if codes.size and int(codes.max()) >= self.config.codebook_size:
            raise InputError(f"code {int(codes.max())} of a codebook of {self.config.codebook_size} entries")
        total = np.zeros((codes.shape[1], len(self.mean)), np.float32)
        for entries, row in zip(self.codebooks, codes, strict=True):
            total += entries[row]
        return total * self.deviation + self.mean

    def encode(self, audio: Audio) -> Codes:
        """Return codes (batch, codebooks, frames) of mono audio (batch, samples)."""
        return np.stack([self.quantise(self.config.mel(signal)) for signal in audio])

    def decode(self, codes: Codes) -> Audio:
        """Return mono audio (batch, frames x hop) in [-1, 1] of codes (batch, codebooks, frames)."""
        return np.stack([self.config.mel.invert(self.log_mel(clip)) for clip in codes])

    def save(self, folder: Path) -> None:
        """Write rvq.npz, then codec.json, which makes the folder a codec."""
        buffer = io.BytesIO()
        np.savez(buffer, mean=self.mean, deviation=self.deviation, codebooks=self.codebooks)
        write_atomically(folder / ARRAYS, buffer.getvalue())
        description = {
            "name": "rvq",
            "fingerprint": self.fingerprint,
            "config": self.config.model_dump(),
            "report": self.report.model_dump(),
        }
        write_atomically(folder / CODEC_FILE, (json.dumps(description, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path, description: dict[str, Any]) -> "RvqCodec":
        """Read the arrays of a codec that codec.json describes; `load_codec` checks them by their fingerprint."""
        config = RvqConfig.model_validate(description["config"])
        arrays = read_arrays(folder / ARRAYS)
        bands = config.mel.bands
        shapes = {
            "mean": (bands,),
            "deviation": (bands,),
            "codebooks": (config.n_codebooks, config.codebook_size, bands),
        }
        for name, shape in shapes.items():
            found = arrays[name]
            if found.dtype != np.float32 or found.shape != shape:
                raise InputError(
                    f"{folder / ARRAYS}: {name} holds {found.dtype} {found.shape}; {CODEC_FILE} says float32 {shape}"
                )
        report = RvqReport.model_validate(description["report"])
        return cls(config=config, report=report, **{name: arrays[name] for name in shapes})


def _nearest(rows: Array, entries: Array) -> npt.NDArray[np.intp]:
    # argmin |r - c|^2 = argmax r.c - |c|^2 / 2, without the (rows, entries, bands) differences.
    half = np.square(entries).sum(axis=1) * np.float32(0.5)
    out = np.empty(len(rows), dtype=np.intp)
    for start in range(0, len(rows), _ROWS):
        out[start : start + _ROWS] = np.argmax(rows[start : start + _ROWS] @ entries.T - half, axis=1)
    return out


def _kmeans(rows: Array, entries: int, seed: int) -> Array:
    """Return k-means centres (entries, bands): mini-batches first, then full Lloyd iterations."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped, unused-ignore]

    # One thread: several threads add partial sums in the order they finish, and the codec would differ between runs.
    with threadpool_limits(limits=1):
        rough = MiniBatchKMeans(
            entries, batch_size=4096, n_init=1, max_iter=10, random_state=seed, reassignment_ratio=0.01
        ).fit(rows)
        settled = KMeans(entries, init=rough.cluster_centers_, n_init=1, max_iter=10).fit(rows)
    return np.asarray(settled.cluster_centers_, dtype=np.float32)
