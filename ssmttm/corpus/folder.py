"""The source `folder`: a directory of sound files and captions for them, in MTG-Jamendo's layout among others."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from ssmttm.corpus.audio import SUFFIXES, stream_audio
from ssmttm.corpus.caption_files import CaptionRow, read_captions
from ssmttm.corpus.group_keys import keys_of, sound_tags
from ssmttm.corpus.manifest import Skipped
from ssmttm.corpus.packages import installed_version
from ssmttm.corpus.published import SPLIT_COLUMN, SPLITS, published_hash, read_published, split_of
from ssmttm.corpus.source import OpenTrack, TrackFacts, TrackRef
from ssmttm.corpus.spec import GROUP_BY, BuildSpec
from ssmttm.errors import InputError
from ssmttm.files import sha256_file

_USUAL = ("captions.jsonl", "captions.json", "captions.csv", "metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class FolderSource:
    """Sound files of a directory under one specification."""

    spec: BuildSpec
    name: str = "folder"

    @property
    def root(self) -> Path:
        """The audio directory; raises InputError if it does not exist."""
        root = self.spec.audio
        if root is None or not root.is_dir():
            raise InputError(f"{root}: no such directory; `audio` must name the folder of the sound files")
        return root

    def tracks(self) -> tuple[list[TrackRef], list[Skipped]]:
        """Return a track for each captioned file; raises InputError if files or captions are missing."""
        files = {name for name, _ in self._files}
        if not files:
            raise InputError(f"{self.root}: holds no sound file ({', '.join(SUFFIXES)})")
        rows = self._rows(files)
        splits = self._published(rows, files)
        refs, skipped = [], []
        for name in sorted(files):
            if not name.isprintable():
                skipped.append(Skipped(track=ascii(name), reason="its name is not printable text"))
                continue
            mine = rows.get(name)
            if not mine:
                skipped.append(Skipped(track=name, reason="no caption"))
                continue
            if splits is not None and splits.get(name) not in SPLITS:
                other = f"names another split: {splits[name]}" if name in splits else "does not name it"
                skipped.append(Skipped(track=name, reason=f"the published split {other}"))
                continue
            refs.append(
                TrackRef(
                    track=name,
                    piece=name,
                    group=name,
                    path=self.root / name,
                    group_keys=tuple(dict.fromkeys(key for row in mine for key in row.group_keys)),
                    split=splits[name] if splits is not None else "",
                    captions=tuple(row.caption for row in mine),
                    title=next((row.title for row in mine if row.title), Path(name).stem),
                    licence=next(
                        (row.licence for row in mine if row.licence), self.spec.licence or "unknown"
                    ),
                )
            )
        if not refs:
            named = " and stands in the published split" if splits is not None else ""
            raise InputError(f"{self.root}: none of its {len(files)} sound files has a caption{named}")
        for kind in set(self.spec.group_by) - set(GROUP_BY):
            if not any(key.startswith(f"{kind}:") for ref in refs for key in ref.group_keys):
                raise InputError(
                    f"group_by is {kind!r}, but no row of the captions has a value in a column {kind!r}"
                )
        return refs, skipped

    def identity(self) -> dict[str, JsonValue]:
        """Return the hashes of the directory's listing (names and sizes) and of the caption files."""
        listing = sha256()
        for name, size in self._files:
            listing.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        found: dict[str, JsonValue] = {"listing": listing.hexdigest()}
        for key, path in (("captions", self._captions), ("tags", self.spec.tags)):
            if path is not None:
                if not path.is_file():
                    raise InputError(f"{path}: no such file; `{key}` names it")
                found[key] = sha256_file(path)
        if (path := self.spec.splits_path) is not None:
            found["splits"] = published_hash(path)
        return found

    def made_with(self) -> dict[str, JsonValue]:
        """Return the versions of soundfile and soxr."""
        return {name: installed_version(name) for name in ("soundfile", "soxr")}

    def open(self, ref: TrackRef) -> OpenTrack:
        """Open one file as a stream."""
        tagged = {"artist", "album"} & set(self.spec.group_by)
        facts = TrackFacts(
            title=ref.title,
            licence=ref.licence,
            captions=ref.captions,
            group_keys=keys_of(sound_tags(ref.path), self.spec) if tagged else (),
        )
        return OpenTrack(facts, stream_audio(ref.path, self.spec.sample_rate))

    @cached_property
    def _files(self) -> list[tuple[str, int]]:
        """(path in the directory, bytes) of each sound file, sorted."""
        found = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                if path.suffix.lower() in SUFFIXES and not name.startswith(".") and path.is_file():
                    found.append((path.relative_to(self.root).as_posix(), path.stat().st_size))
        return sorted(found)

    @cached_property
    def _captions(self) -> Path | None:
        if self.spec.captions is not None:
            return self.spec.captions
        usual = [self.root / name for name in _USUAL if (self.root / name).is_file()]
        if not usual and self.spec.tags is None:
            raise InputError(
                f"{self.root}: has no captions; give `captions`, `tags`, or one of {', '.join(_USUAL)}"
            )
        return usual[0] if usual else None

    def _about(self, record: dict[str, Any]) -> tuple[tuple[str, ...], str]:
        """Return the facts of a record that keep tracks together, and the split that it names."""
        column = None if self.spec.splits_path else self.spec.splits or SPLIT_COLUMN
        return keys_of(record, self.spec), split_of(record, column) if column not in (None, "none") else ""

    def _published(self, rows: dict[str, list[CaptionRow]], files: set[str]) -> dict[str, str] | None:
        """Return the published splits of the tracks, None if splits are drawn."""
        splits, path = self.spec.splits, self.spec.splits_path
        if path is not None:
            found, origin = read_published(path, _Resolver(files)), str(path)
        else:
            found = {}
            origin = f"column {splits or SPLIT_COLUMN} of the captions"
            for name, mine in rows.items():
                named = sorted({row.split for row in mine if row.split})
                if len(named) > 1 and not {*named}.isdisjoint(SPLITS):
                    raise InputError(f"{mine[0].where}: {name} is in {named[0]} and in {named[1]}")
                found |= dict.fromkeys([name] if named else [], *named[:1])
            known = {split for split in found.values() if split in SPLITS}
            if splits in (None, "none") and not known - {"train"}:
                return None
            if not known:
                raise InputError(
                    f"splits is {splits!r}, but {origin} names no split such as train, valid or test"
                )
        self.spec.check_published(origin, set(found.values()))
        return found

    def _rows(self, files: set[str]) -> dict[str, list[CaptionRow]]:
        """Return rows by file; those of `tags` only for files without a row in `captions`."""
        resolve = _Resolver(files)
        rows: dict[str, list[CaptionRow]] = {}
        if self._captions is not None:
            absent = _join(rows, read_captions(self._captions, about=self._about), resolve)
            # A Jamendo TSV describes the whole data set, of which a folder often is a part.
            if absent and self._captions.suffix.lower() != ".tsv":
                raise InputError(
                    f"{self._captions}: {len(absent)} rows name files that are not in {self.root}; "
                    f"the first is {absent[0].name!r} ({absent[0].where.rpartition(', ')[2]})"
                )
        if self.spec.tags is not None:
            tagged: dict[str, list[CaptionRow]] = {}
            _join(tagged, read_captions(self.spec.tags, about=self._about), resolve)
            rows = tagged | rows
        return rows


class _Resolver:
    """Find the sound file of a row by its path, else by a unique name without suffix, as data sets use."""

    def __init__(self, files: set[str]) -> None:
        self._files = files
        self._stems: dict[str, str | None] = {}
        for name in files:
            # The file of MTG-Jamendo's low-quality audio for the row 14/214.mp3 is 14/214.low.mp3.
            for stem in {Path(name).stem, Path(name).stem.removesuffix(".low")}:
                self._stems[stem] = None if stem in self._stems else name

    def __call__(self, wanted: str) -> str | None:
        if wanted in self._files:
            return wanted
        path = Path(wanted)
        low = path.with_name(f"{path.stem}.low{path.suffix}").as_posix()
        if low in self._files:
            return low
        if path.parent != Path() or path.suffix.lower() in SUFFIXES:
            return None
        return self._stems.get(wanted) or self._stems.get(wanted.removeprefix("track_").lstrip("0"))


def _join(
    rows: dict[str, list[CaptionRow]], read: Iterable[CaptionRow], resolve: _Resolver
) -> list[CaptionRow]:
    """Add rows to those of their files; return the rows whose file is absent."""
    absent = []
    for row in read:
        name = resolve(row.name)
        if name is None:
            absent.append(row)
        else:
            rows.setdefault(name, []).append(row)
    return absent
