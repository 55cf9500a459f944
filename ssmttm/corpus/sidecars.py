"""Read the captions that lie beside sound files: AudioCraft's `song.json`, or `song.txt` with a caption a line.

AudioCraft's record is that of its MusicGen data sets: description, title, artist, genre, moods, keywords, instrument
and more (facebookresearch/audiocraft, docs/DATASETS.md). The description is the caption; without one the genre, moods
and instrument make a sentence.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssmttm.corpus.caption_files import About, CaptionRow, Faults, says_nothing
from ssmttm.corpus.caption_keys import LICENCE_KEYS, captions_of, first_of, key_of, texts_of
from ssmttm.corpus.tag_captions import sentence_of
from ssmttm.errors import InputError
from ssmttm.files import parse_json

ENDINGS = (".json", ".txt")
_MAX_BYTES = 2**20


class Sidecars:
    """The captions beside the sound files of a directory, read once."""

    def __init__(
        self, root: Path, sidecars: set[str], sounds: list[str], faults: Faults, about: About = says_nothing
    ) -> None:
        """Read the sidecars of `sounds`; paths are relative to `root`. Faulty ones are counted in `faults`.

        about: reads the facts that keep tracks together, and the split.
        """
        self.rows: dict[str, list[CaptionRow]] = {}
        digest = hashlib.sha256()
        for sound in sounds:
            for name in _names(sound):
                if name not in sidecars:
                    continue
                content = _content(root / name, name, faults)
                digest.update(
                    f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode("utf-8", "surrogateescape")
                )
                if sound not in self.rows and (rows := list(_rows(name, content, faults, about))):
                    self.rows[sound] = rows
        self.sha256 = digest.hexdigest()


def _names(sound: str) -> Iterator[str]:
    """Yield the names that the sidecar of a sound file may have."""
    for stem in (os.path.splitext(sound)[0], sound):  # noqa: PTH122  # a text, not a Path
        yield from (f"{stem}{ending}" for ending in ENDINGS)


def _content(path: Path, name: str, faults: Faults) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        faults.add("beside the sound files", name, f"cannot be read: {error.strerror}")
        return b""
    if len(content) > _MAX_BYTES:
        faults.add("beside the sound files", name, f"is longer than {_MAX_BYTES:,} bytes")
        return b""
    return content


def _rows(name: str, content: bytes, faults: Faults, about: About) -> Iterator[CaptionRow]:
    if not content:
        return
    record: Any
    try:
        text = content.decode("utf-8-sig")
        record = parse_json(text) if name.endswith(".json") else {"captions": text.splitlines()}
    except UnicodeDecodeError:
        faults.add("beside the sound files", name, "is not UTF-8 text")
        return
    except ValueError:
        faults.add("beside the sound files", name, "is not valid JSON")
        return
    if not isinstance(record, dict):
        faults.add("beside the sound files", name, "is not a JSON record with a description")
        return
    keyed = {key_of(key): value for key, value in record.items()}
    captions = captions_of(keyed) or _of_tags(keyed)
    if not captions:
        faults.add(
            "beside the sound files", name, "has no caption: no description, genre, moods or instrument"
        )
    title, licence = first_of(keyed, ("title",)), first_of(keyed, LICENCE_KEYS)
    group_keys, split = about(record)
    facts = {"title": title, "licence": licence, "where": name}
    for caption in captions:
        yield CaptionRow(name=name, caption=caption, group_keys=group_keys, split=split, **facts)


def _of_tags(record: dict[str, Any]) -> list[str]:
    """Return the sentence of AudioCraft's tags, which are lists or texts with commas."""
    kinds = {
        kind: [
            word.strip().lower()
            for text in texts_of(record.get(key))
            for word in text.split(",")
            if word.strip()
        ]
        for kind, key in (("genre", "genre"), ("mood", "moods"), ("instrument", "instrument"))
    }
    kinds["mood"] = kinds["mood"] or [
        word.strip().lower()
        for text in texts_of(record.get("keywords"))
        for word in text.split(",")
        if word.strip()
    ]
    return [sentence_of(kinds)] if any(kinds.values()) else []


def no_captions(root: Path, usual: tuple[str, ...]) -> InputError:
    """Return the error of a directory without any captions."""
    return InputError(
        f"{root}: has no captions; give `captions` (a .csv, .tsv, .json, .jsonl or .parquet whose rows name file and "
        f"caption) or `tags`, put one of {', '.join(usual)} into it, or a song.json or song.txt beside each song.wav"
    )
