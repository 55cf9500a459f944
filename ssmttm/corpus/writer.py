"""Write the files of a corpus, each whole or not at all; the manifest comes last and marks the corpus as finished."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from ssmttm.codec.facts import CodecFacts
from ssmttm.corpus.manifest import (
    FORMAT,
    MANIFEST,
    Clip,
    Grouping,
    Manifest,
    SetAside,
    ShardFacts,
    Skipped,
    SplitFacts,
    content_fingerprint,
)
from ssmttm.files import replacing, sha256_file, write_atomically


def shard_name(split: str, number: int) -> str:
    """Return the path of a shard inside its corpus."""
    return f"shards/{split}-{number:05d}.npy"


def write_shard(corpus: Path, split: str, number: int, codes: npt.NDArray[np.uint16]) -> ShardFacts:
    """Write codes (clips, codebooks, frames) as one shard, and describe it."""
    file = shard_name(split, number)
    path = corpus / file
    with replacing(path) as handle:
        np.save(handle, np.ascontiguousarray(codes, dtype="<u2"), allow_pickle=False)
    return ShardFacts(file=file, clips=len(codes), sha256=sha256_file(path))


def write_clips(corpus: Path, split: str, clips: Iterable[Clip], shards: Sequence[ShardFacts]) -> SplitFacts:
    """Write the clips file of a split, one clip at a time, and describe the split."""
    file = f"clips-{split}.jsonl"
    path = corpus / file
    count = valid = 0
    tracks: set[str] = set()
    with replacing(path) as handle:
        for clip in clips:
            handle.write((json.dumps(clip.model_dump(), ensure_ascii=False) + "\n").encode())
            count += 1
            valid += clip.frames
            tracks.add(clip.track)
    return SplitFacts(
        clips=count,
        tracks=len(tracks),
        valid_frames=valid,
        shards=tuple(shards),
        captions=file,
        captions_sha256=sha256_file(path),
    )


def write_manifest(
    corpus: Path,
    *,
    source: str,
    codec: CodecFacts,
    frames: int,
    splits: dict[str, SplitFacts],
    licences: Iterable[str],
    skipped: Iterable[Skipped] = (),
    set_aside: Iterable[SetAside] = (),
    grouping: Grouping | None = None,
    recipe: dict[str, JsonValue] | None = None,
) -> Manifest:
    """Write the manifest of a corpus whose codec, shards and clips are in place."""
    codec_files = sorted(path for path in (corpus / "codec").glob("*") if not path.name.startswith("."))
    manifest = Manifest(
        format=FORMAT,
        name=corpus.resolve().name,
        source=source,
        codec=codec,
        frames=frames,
        splits=splits,
        licences=tuple(sorted(set(licences))),
        skipped=tuple(skipped),
        set_aside=tuple(set_aside),
        grouping=grouping,
        recipe=recipe or {},
        codec_files={f"codec/{path.name}": sha256_file(path) for path in codec_files},
        fingerprint=content_fingerprint(codec, frames, splits),
    )
    write_atomically(corpus / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest
