"""The manifest of a corpus, its clips, and the check that nothing in it has changed.

A corpus is a folder::

    manifest.json               what is in it, with a sha256 of every file and one fingerprint of the content
    codec/                      the codec that made the tokens, for decoding samples
    shards/SPLIT-00000.npy      uint16 (clips, codebooks, frames), read by memory map
    clips-SPLIT.jsonl           one line a clip, in the order of the shards: caption, track, licence

The fingerprint covers tokens, captions and codec, never paths, dates or the number of workers: two builds
of the same music from the same specification have the same one. This module needs pydantic alone, because
plans and training read manifests where no audio library is installed.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, ValidationError

from ssmttm.codec.facts import CodecFacts
from ssmttm.errors import InputError
from ssmttm.files import Frozen, canonical_json, parse_json, read_document, sha256_file

FORMAT = 1
MANIFEST = "manifest.json"


def _inside(file: str) -> str:
    """Refuse a path that leaves the corpus: manifests may come from other people."""
    path = Path(file)
    if path.is_absolute() or ".." in path.parts or not file:
        raise ValueError(f"{file!r} is not a path inside the corpus")
    return file


InsidePath = Annotated[str, AfterValidator(_inside)]


class ShardFacts(Frozen):
    """One array file of tokens."""

    file: InsidePath
    clips: int = Field(gt=0)
    sha256: str


class SplitFacts(Frozen):
    """The clips of one split, in the same order in the shards and in the clips file."""

    clips: int = Field(ge=0)
    tracks: int = Field(ge=0)
    valid_frames: int = Field(ge=0)
    """Frames of music in all clips, without the padding of short ones."""
    shards: tuple[ShardFacts, ...]
    captions: InsidePath
    captions_sha256: str


class Skipped(Frozen):
    """A track that was found and not used."""

    track: str
    reason: str


class SetAside(Frozen):
    """Rows of a caption file that were not used, for one reason."""

    file: str
    reason: str
    """The rest of a sentence about such a row: `has no caption`."""
    rows: int = Field(gt=0)
    first: tuple[str, ...]
    """Places of the first rows in the file."""


class Leak(Frozen):
    """Tracks of a published split that share a fact and stand in several splits."""

    by: str
    """Kind of the fact: artist, album, content, near-duplicate or a column of the captions file."""
    value: str
    """The shared fact; empty for kinds that have no name."""
    tracks: dict[str, tuple[str, ...]]
    """The first of the tracks in each split."""


class Grouping(Frozen):
    """Tracks that were kept together when the corpus was split."""

    by: tuple[str, ...]
    """Kinds of facts that were compared."""
    groups: int = Field(ge=0)
    """Groups of the tracks that the corpus uses, those of one track included."""
    tracks: int = Field(ge=0)
    largest: int = Field(ge=0)
    """Tracks of the largest group."""
    largest_by: tuple[str, ...] = ()
    """Kinds of the facts that join the largest group."""
    shared: dict[str, int] = Field(default_factory=dict)
    """For each kind the number of facts that two or more tracks share."""
    twins: int = Field(default=0, ge=0)
    """Tracks left out since another one holds the same sound."""
    published: str = ""
    """Origin of a published split; empty if the splits were drawn."""
    leaking: dict[str, int] = Field(default_factory=dict)
    """For each kind the number of facts that tracks of several splits share."""
    leaks: tuple[Leak, ...] = ()
    """The first leaks of each kind."""


class Clip(Frozen):
    """One line of a clips file: a clip's origin and caption."""

    clip: int = Field(ge=0)
    """Index in the split."""
    track: str
    start_seconds: float = Field(ge=0)
    frames: int = Field(ge=0)
    """Frames of music; what follows them in the shard is padding."""
    caption: str
    title: str
    licence: str


class Manifest(Frozen):
    """All facts of a corpus but its tokens and captions."""

    format: Literal[1]
    name: str
    source: str
    codec: CodecFacts
    frames: int = Field(gt=0)
    """Frames of every clip, padding included."""
    splits: dict[str, SplitFacts]
    licences: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    set_aside: tuple[SetAside, ...] = ()
    grouping: Grouping | None = None
    """None in corpora of older versions, which kept only the pieces of source bach together."""
    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    """The specification that made the content; the next build compares itself with it."""
    codec_files: dict[InsidePath, str] = Field(default_factory=dict)
    """sha256 of each of the codec's files; empty in corpora of older versions."""
    fingerprint: str

    def hours(self, split: str) -> float:
        """Return the hours of music in a split, without padding."""
        return self.splits[split].valid_frames / self.codec.frame_rate / 3600


def content_fingerprint(codec: CodecFacts, frames: int, splits: dict[str, SplitFacts]) -> str:
    """Return the sha256 over the content of a corpus: codec, tokens in their order, captions."""
    content = {
        "format": FORMAT,
        "codec": codec.model_dump(),
        "frames": frames,
        "splits": {
            name: {"shards": [s.sha256 for s in facts.shards], "captions": facts.captions_sha256}
            for name, facts in splits.items()
        },
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def load_manifest(corpus: Path) -> Manifest:
    """Read CORPUS/manifest.json; raises InputError if it is missing, not a manifest, or of another format."""
    path = corpus / MANIFEST
    try:
        raw = parse_json(read_document(path))
    except FileNotFoundError:
        raise InputError(
            f"{corpus}: no corpus here ({MANIFEST} is missing); build one by `ssmscale data build`"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: format is {found!r}; this version reads format {FORMAT}")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}") from None
    expected = content_fingerprint(manifest.codec, manifest.frames, manifest.splits)
    if manifest.fingerprint != expected:
        raise InputError(
            f"{path}: fingerprint is {manifest.fingerprint[:12]}, but its shards, captions and codec give "
            f"{expected[:12]}; the manifest was edited; build the corpus again"
        )
    return manifest


def verify_corpus(corpus: Path, manifest: Manifest) -> None:
    """Hash all files of a corpus again; raises InputError that names the first that is missing or differs."""
    files = list(manifest.codec_files.items())
    for facts in manifest.splits.values():
        files += [(shard.file, shard.sha256) for shard in facts.shards]
        files.append((facts.captions, facts.captions_sha256))
    for file, expected in files:
        path = corpus / file
        if not path.is_file():
            raise InputError(f"{path}: missing, though {MANIFEST} lists it")
        found = sha256_file(path)
        if found != expected:
            raise InputError(
                f"{path}: sha256 is {found[:12]}, {MANIFEST} says {expected[:12]}: the file has changed"
            )
