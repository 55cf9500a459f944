"""Small corpora for tests: real shards by the real writer, and tokens with the structure of music."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssmttm.codec.mel import LogMel
from ssmttm.codec.rvq import RvqCodec, RvqConfig, RvqReport
from ssmttm.corpus.manifest import Clip, Manifest
from ssmttm.corpus.writer import write_clips, write_manifest, write_shard

KEYS = ("C major", "G major", "D minor", "A minor")


def write_tiny_corpus(
    path: Path,
    clips: int = 48,
    codebooks: int = 2,
    frames: int = 50,
    codebook_size: int = 64,
    *,
    seed: int = 0,
    shard_clips: int = 32,
) -> Manifest:
    """Write a corpus of `clips` training clips and a third as many validation clips.

    A clip holds notes of 3 to 12 frames. The caption's key decides the codes of its notes, later codebooks follow
    the first with noise, and a tenth of the codes is noise: a model learns from the past and from the caption, and its
    loss has a floor above zero. Every fourth clip is shorter. The codec makes a tone of every code.
    """
    codec = tone_codec(codebooks, codebook_size)
    codec.save(path / "codec")
    rng = np.random.default_rng(seed)
    splits = {}
    for split, count in (("train", clips), ("valid", max(4, clips // 3))):
        records, codes = [], np.zeros((count, codebooks, frames), dtype=np.uint16)
        for index in range(count):
            key = int(rng.integers(len(KEYS)))
            valid = frames if index % 4 else max(1, frames - int(rng.integers(1, max(2, frames // 4))))
            codes[index, :, :valid] = _notes(rng, key, codebooks, valid, codebook_size)
            records.append(
                Clip(
                    clip=index,
                    track=f"{split}-{index // 2}",
                    start_seconds=(index % 2) * frames / 50.0,
                    frames=valid,
                    caption=f"A made piece in {KEYS[key]}, number {index // 2}.",
                    title=f"Piece {index // 2}",
                    licence="CC0-1.0",
                )
            )
        shards = [
            write_shard(path, split, number, codes[start : start + shard_clips])
            for number, start in enumerate(range(0, count, shard_clips))
        ]
        splits[split] = write_clips(path, split, records, shards)
    return write_manifest(
        path,
        source="tiny",
        codec=codec.facts,
        frames=frames,
        splits=splits,
        licences=["CC0-1.0"],
    )


def tone_codec(codebooks: int, codebook_size: int, bands: int = 40) -> RvqCodec:
    """Make a codec by hand: a code of the first codebook is a narrow band of sound; later codebooks colour it."""
    config = RvqConfig(
        mel=LogMel(sample_rate=16000, frame_rate=50, bands=bands),
        n_codebooks=codebooks,
        codebook_size=codebook_size,
        seed=0,
    )
    entries = np.random.default_rng(0).normal(0, 0.3, (codebooks, codebook_size, bands)).astype(np.float32)
    entries[0, np.arange(codebook_size), np.arange(codebook_size) * bands // codebook_size] = 9
    silence = np.full(bands, -13, np.float32)
    report = RvqReport(frames=0, variance_explained=(), entropy_bits=())
    return RvqCodec(config, silence, np.ones(bands, np.float32), entries, report)


def _notes(
    rng: np.random.Generator, key: int, codebooks: int, frames: int, codebook_size: int
) -> npt.NDArray[np.uint16]:
    scale = (key * 7 + np.arange(0, codebook_size, max(1, codebook_size // 16))) % codebook_size
    out = np.empty((codebooks, frames), dtype=np.int64)
    frame, degree = 0, int(rng.integers(len(scale)))
    while frame < frames:
        length = int(rng.integers(3, 13))
        out[0, frame : frame + length] = scale[degree]
        degree = (degree + int(rng.integers(-2, 3))) % len(scale)
        frame += length
    for book in range(1, codebooks):
        out[book] = (out[book - 1] * 5 + 3 + rng.integers(0, 3, frames)) % codebook_size
    noisy = rng.random(out.shape) < 0.1
    out[noisy] = rng.integers(0, codebook_size, int(noisy.sum()))
    return out.astype(np.uint16)
