"""Describe the content of a corpus before anything is trained on it."""

from pathlib import Path

import numpy as np

from ssmttm.codec.facts import CodecFacts
from ssmttm.codec.rvq import entropy_bits
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.corpus.manifest import Grouping, Manifest, SetAside, load_manifest
from ssmttm.files import Frozen

_CLIPS = 256  # read at once: 2 MB of tokens at 4 codebooks and 500 frames


class SplitDescription(Frozen):
    """One split in numbers."""

    clips: int
    tracks: int
    hours: float
    """Hours of music, without the padding of short clips."""
    tokens: int
    entropy_bits: tuple[float, ...]
    """Entropy of each codebook's codes, context ignored."""
    repeat_share: tuple[float, ...]
    """Share of each codebook's codes that repeat the code before: the accuracy of a model that copies."""


class CorpusDescription(Frozen):
    """A corpus in numbers, and a few of its captions."""

    name: str
    source: str
    fingerprint: str
    codec: CodecFacts
    frames: int
    clip_seconds: float
    splits: dict[str, SplitDescription]
    licences: tuple[str, ...]
    skipped: int
    skipped_reasons: dict[str, tuple[str, ...]]
    """The tracks that were left out, by reason."""
    set_aside: tuple[SetAside, ...]
    """Rows of caption files that were not used."""
    grouping: Grouping | None
    """Tracks that were kept together in one split; None if an older version built the corpus."""
    captions: tuple[str, ...]
    """Captions of the first clips of the training split."""


def describe(corpus: Path) -> CorpusDescription:
    """Read a whole corpus and describe it; raises InputError if it is damaged."""
    manifest = load_manifest(corpus)
    opened = {split: TokenDataset(corpus, split) for split in manifest.splits}
    shown = opened.get("train") or next(iter(opened.values()))
    return CorpusDescription(
        name=manifest.name,
        source=manifest.source,
        fingerprint=manifest.fingerprint,
        splits={split: _describe_split(dataset) for split, dataset in opened.items()},
        codec=manifest.codec,
        frames=manifest.frames,
        clip_seconds=manifest.frames / manifest.codec.frame_rate,
        licences=manifest.licences,
        skipped=len(manifest.skipped),
        grouping=manifest.grouping,
        skipped_reasons=left_out(manifest),
        set_aside=manifest.set_aside,
        captions=tuple(shown.captions(range(min(5, len(shown))))),
    )


def left_out(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """Return the tracks that were found and not used, by reason, the commonest reason first."""
    found: dict[str, list[str]] = {}
    for one in manifest.skipped:
        found.setdefault(one.reason, []).append(one.track)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return {reason: tuple(tracks) for reason, tracks in ordered}


def _describe_split(dataset: TokenDataset) -> SplitDescription:
    manifest, codec = dataset.manifest, dataset.manifest.codec
    facts = manifest.splits[dataset.split]
    counts = np.zeros((codec.n_codebooks, codec.codebook_size), dtype=np.int64)
    repeats = np.zeros(codec.n_codebooks, dtype=np.int64)
    pairs = 0
    for start in range(0, len(dataset), _CLIPS):
        indices = range(start, min(start + _CLIPS, len(dataset)))
        codes, lengths = dataset.codes(indices), dataset.lengths(indices)
        real = np.arange(manifest.frames) < lengths[:, None]  # (clips, frames)
        for book in range(codec.n_codebooks):
            counts[book] += np.bincount(codes[:, book][real], minlength=codec.codebook_size)
        same = (codes[:, :, 1:] == codes[:, :, :-1]) & real[:, None, 1:]
        repeats += same.sum(axis=(0, 2))
        pairs += int(real[:, 1:].sum())
    return SplitDescription(
        clips=facts.clips,
        tracks=facts.tracks,
        hours=manifest.hours(dataset.split),
        tokens=facts.valid_frames * codec.n_codebooks,
        entropy_bits=tuple(entropy_bits(row) for row in counts),
        repeat_share=tuple(float(n) / max(1, pairs) for n in repeats),
    )
