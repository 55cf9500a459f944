"""The source `folder`: a directory of sound files and captions for them, in MTG-Jamendo's layout among others.

Captions are a file whose rows name sound files, or lie beside them. A row or a file that cannot be used is left out and
named with its reason; the others make the corpus.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from ssmttm.corpus.audio import FIRST_SUFFIXES, SUFFIXES, stream_audio
from ssmttm.corpus.caption_files import CaptionRow, Faults, read_captions
from ssmttm.corpus.file_names import FileNames
from ssmttm.corpus.group_keys import keys_of, sound_tags
from ssmttm.corpus.listing import Listing, list_files
from ssmttm.corpus.manifest import SetAside, Skipped
from ssmttm.corpus.packages import installed_version
from ssmttm.corpus.published import SPLIT_COLUMN, SPLITS, published_hash, read_published, split_of
from ssmttm.corpus.sidecars import ENDINGS, Sidecars, no_captions
from ssmttm.corpus.source import OpenTrack, TrackFacts, TrackRef
from ssmttm.corpus.spec import GROUP_BY, BuildSpec
from ssmttm.errors import InputError
from ssmttm.files import sha256_file

_USUAL = ("captions.jsonl", "captions.json", "captions.csv", "captions.tsv", "metadata.jsonl", "metadata.csv")


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
        if not self._sounds:
            raise InputError(f"{self.root}: holds no sound file ({', '.join(SUFFIXES)})")
        rows = self._rows
        splits = self._published
        refs, skipped = [], [one for one in self._listing.skipped if not one.track.endswith(ENDINGS)]
        for name in self._sounds:
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
                    by_content=True,
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
            files = ", ".join(path.name for path in (self._captions_file, self.spec.tags) if path is not None)
            why = str(self._faults) or f"{files or self.spec.captions} holds no rows"
            raise InputError(
                f"{self.root}: none of its {len(self._sounds)} sound files has a caption{named} ({why})"
            )
        for kind in set(self.spec.group_by) - set(GROUP_BY):
            if not any(key.startswith(f"{kind}:") for ref in refs for key in ref.group_keys):
                raise InputError(
                    f"group_by is {kind!r}, but no row of the captions has a value in a column {kind!r}"
                )
        return refs, skipped

    def set_aside(self) -> tuple[SetAside, ...]:
        """Return the rows of captions that could not be used, by reason."""
        _ = self._rows
        return self._faults.found()

    def identity(self) -> dict[str, JsonValue]:
        """Return the hashes of the directory's listing (names and sizes) and of the captions."""
        listing, more = sha256(), sha256()
        for name in self._sounds:
            which = listing if name.lower().endswith(FIRST_SUFFIXES) else more
            which.update(f"{name}\0{self._listing.files[name]}\n".encode("utf-8", "surrogateescape"))
        found: dict[str, JsonValue] = {"listing": listing.hexdigest()}
        if more.digest() != sha256().digest():
            found["more"] = more.hexdigest()
        if self._sidecars is not None:
            found["captions"] = self._sidecars.sha256
        for key, path in (("captions", self._captions_file), ("tags", self.spec.tags)):
            if path is not None:
                if not path.is_file():
                    raise InputError(f"{path}: no such file; `{key}` names it")
                found[key] = sha256_file(path)
        if (path := self.spec.splits_path) is not None:
            found["splits"] = published_hash(path)
        return found

    def made_with(self) -> dict[str, JsonValue]:
        """Return the versions of PyAV, which brings FFmpeg, and soxr."""
        return {name: installed_version(name) for name in ("av", "soxr")}

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
    def _listing(self) -> Listing:
        return _listed(self.root)

    @cached_property
    def _sounds(self) -> list[str]:
        """Paths of the sound files in the directory, sorted."""
        return sorted(name for name in self._listing.files if name.lower().endswith(SUFFIXES))

    @cached_property
    def _captions_file(self) -> Path | None:
        """The file whose rows name sound files, if there is one."""
        if self.spec.captions is not None:
            return None if self.spec.captions.is_dir() else self.spec.captions
        usual = (self.root / name for name in _USUAL)
        return next((path for path in usual if path.is_file()), None)

    @cached_property
    def _sidecars(self) -> Sidecars | None:
        """The captions beside the sound files, if no file has them."""
        given = self.spec.captions
        if self._captions_file is not None or (given is None and self.spec.tags is not None):
            return None
        listing = self._listing if given is None else _listed(given)
        return Sidecars(given or self.root, set(listing.files), self._sounds, self._faults, self._about)

    @cached_property
    def _faults(self) -> Faults:
        return Faults()

    @cached_property
    def _names(self) -> FileNames:
        return FileNames(self.root, self._sounds)

    def _about(self, record: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
        """Return the facts of a record that keep tracks together, and the split that it names."""
        column = None if self.spec.splits_path else self.spec.splits or SPLIT_COLUMN
        return keys_of(record, self.spec), split_of(record, column) if column not in (None, "none") else ""

    @cached_property
    def _published(self) -> dict[str, str] | None:
        """The published splits of the tracks; None if splits are drawn."""
        splits, path = self.spec.splits, self.spec.splits_path
        if path is not None:
            found, origin = read_published(path, self._names.named), str(path)
        else:
            found = {}
            origin = f"column {splits or SPLIT_COLUMN} of the captions"
            for name, mine in self._rows.items():
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

    @cached_property
    def _rows(self) -> dict[str, list[CaptionRow]]:
        """Rows by file; those of `tags` only for files without other captions."""
        rows: dict[str, list[CaptionRow]] = {}
        if self._sidecars is not None:
            rows = self._sidecars.rows
            if not rows and self.spec.captions is None and not self._faults.found():
                raise no_captions(self.root, _USUAL)
        for path in filter(None, (self._captions_file, self.spec.tags)):
            read: dict[str, list[CaptionRow]] = {}
            for name, row in self._resolved(path):
                read.setdefault(name, []).append(row)
            rows = read | rows
        return rows

    def _resolved(self, path: Path) -> Iterator[tuple[str, CaptionRow]]:
        """Yield (sound file, row) of the rows of a captions file that name one."""
        before = ""
        for row in read_captions(path, faults=self._faults, about=self._about):
            name, reason = self._names.find(row.name, row.start)
            if name:
                yield name, row
            elif row.where != before:  # the captions of one row are set aside together
                self._faults.add(path.name, f"{row.where} ({ascii(row.name)[:80]})", reason)
            before = row.where


def _listed(folder: Path) -> Listing:
    """Return the sound files and sidecars of a directory; raises InputError if it cannot be listed."""
    try:
        return list_files(folder, lambda name: name.lower().endswith((*SUFFIXES, *ENDINGS)))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from None
