"""Read caption files: CSV, JSON, JSONL, text with a caption a line, and MTG-Jamendo's TSV, whose tags become captions.

A row names a sound file (except in plain text) and describes it. Names are relative to the audio directory. A name
that leaves the directory is refused, because caption files come from other people.
"""

import csv
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ssmttm.errors import InputError
from ssmttm.files import parse_json

NAME_KEYS = ("path", "file", "file_name", "filename", "audio", "location", "ytid", "track_id", "id")
_CAPTION_KEYS = ("caption", "captions", "text", "description", "prompt")
_LICENCE_KEYS = ("licence", "license")
_MAX_LINE = 2**20  # characters
_MAX_JSON_BYTES = 2**28
_MAX_COLUMNS = 1000


@dataclass(frozen=True)
class CaptionRow:
    """One row of a caption file."""

    name: str
    """Path of the sound file in the audio directory, or its name without the suffix."""
    caption: str
    title: str
    licence: str
    where: str
    """Place of the row, for messages."""
    group_keys: tuple[str, ...] = ()
    """Facts as `kind:value` that keep tracks together."""
    split: str = ""
    """Split that the row names."""


About = Callable[[dict[str, Any]], tuple[tuple[str, ...], str]]
"""Returns the group keys and the split of a record."""


def _says_nothing(_: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    return (), ""


def read_captions(path: Path, *, named: bool = True, about: About = _says_nothing) -> Iterator[CaptionRow]:
    """Yield the rows of a caption file; raises InputError that names the file and the row that is wrong.

    named: require that every row names a sound file; otherwise the name may be empty. about: reads the facts that
    keep tracks together, and the split.
    """
    for where, row in read_records(path):
        yield _caption_row(f"{path}, {where}", row, named=named, about=about)


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of each row of a file; raises InputError that names the file and what is wrong."""
    if not path.is_file():
        raise InputError(f"{path}: no such captions file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        ending = path.suffix or "a name without an ending"
        raise InputError(
            f"{path}: captions are read from .csv, .json, .jsonl, .txt or a Jamendo .tsv, not {ending}"
        )
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def sentence_from_tags(tags: list[str]) -> str:
    """Return a caption of MTG-Jamendo tags such as `genre---rock`, `instrument---guitar`, `mood/theme---calm`."""
    kinds: dict[str, list[str]] = {}
    for tag in tags:
        kind, _, value = tag.partition("---")
        if value:
            kinds.setdefault(kind.split("/")[0], []).append(_COMPOUNDS.get(value, value))
    genre, instrument, mood = (kinds.get(kind, []) for kind in ("genre", "instrument", "mood"))
    words = f"{listed(mood)} {listed(genre)} music".strip() if mood or genre else "music"
    return f"{words[:1].upper()}{words[1:]}{f' with {listed(instrument)}' if instrument else ''}."


def listed(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(_MAX_LINE)
    with closing(_decoded(path, newline="")) as lines:
        reader = csv.DictReader(lines)
        try:
            if len(reader.fieldnames or ()) > _MAX_COLUMNS:
                raise InputError(f"{path}: has more than {_MAX_COLUMNS:,} columns; keep file and caption")
            for row in reader:
                if None in row:
                    raise InputError(
                        f"{path}, line {reader.line_num}: more fields than the header; quote the caption"
                    )
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise InputError(
            f"{path}: has {size:,} bytes, and at most {_MAX_JSON_BYTES:,} are read at once; save the captions as "
            "JSONL, with one record a line"
        )
    text = path.read_text(encoding="utf-8-sig")
    try:
        data = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if isinstance(data, dict):
        for key, value in data.items():
            yield f"key {key!r}", {"path": key, **(value if isinstance(value, dict) else {"caption": value})}
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield f"item {number}", value
    else:
        raise InputError(f"{path}: should be a mapping from file to caption, or a list of records")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path):
        try:
            yield where, parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}, {where}: not valid JSON: {error}") from None


def _text_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((where, {"caption": line}) for where, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_decoded(path), start=1):
        if line.strip():
            yield f"line {number}", line


def _decoded(path: Path, newline: str | None = None) -> Generator[str]:
    """Yield the lines of a text file; raises InputError for an overlong one."""
    with path.open(newline=newline, encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise InputError(
                    f"{path}, line {number}: is longer than {_MAX_LINE:,} characters; write one caption a line"
                )
            yield line


def _jamendo_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with closing(_decoded(path)) as lines:
        header = next(lines, "").rstrip("\r\n").split("\t")
        if header[:6] != ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]:
            raise InputError(
                f"{path}, line 1: a TSV must have MTG-Jamendo's header TRACK_ID ARTIST_ID ALBUM_ID PATH DURATION TAGS"
            )
        for number, line in enumerate(lines, start=2):
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) < 6:
                raise InputError(
                    f"{path}, line {number}: has {len(fields)} fields, a Jamendo row has 6 or more"
                )
            yield (
                f"line {number}",
                {
                    "path": fields[3],
                    "artist_id": fields[1],
                    "album_id": fields[2],
                    "caption": sentence_from_tags(fields[5:]),
                },
            )


_READERS = {
    ".csv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".tsv": _jamendo_rows,
    ".txt": _text_rows,
}
TABLES = tuple(_READERS)
"""Endings of the files that are read."""


def _caption_row(where: str, row: Any, *, named: bool, about: About) -> CaptionRow:
    if not isinstance(row, dict):
        raise InputError(f"{where}: should be a record with path and caption, is {type(row).__name__}")
    record = {str(key).strip().lower(): value for key, value in row.items()}
    name = _first(record, NAME_KEYS)
    caption = _first(record, _CAPTION_KEYS)
    if not name and named:
        raise InputError(f"{where}: names no file; one of {', '.join(NAME_KEYS)} is needed")
    if not caption:
        raise InputError(f"{where}: has no caption; one of {', '.join(_CAPTION_KEYS)} is needed")
    plain = PurePosixPath(name.replace("\\", "/"))
    if plain.is_absolute() or ".." in plain.parts or ":" in "".join(plain.parts[:1]):
        raise InputError(f"{where}: {name!r} is outside the audio directory; give a path relative to it")
    group_keys, split = about(record)
    return CaptionRow(
        name=str(plain) if name else "",
        caption=" ".join(caption.split()),
        title=_first(record, ("title",)),
        licence=_first(record, _LICENCE_KEYS),
        where=where,
        group_keys=group_keys,
        split=split,
    )


def _first(record: dict[str, Any], keys: tuple[str, ...]) -> str:
    for key in keys:
        value = record.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str | int) and str(value).strip():
            return str(value).strip()
    return ""


# The common ones of the compounds that Jamendo writes as one word.
_COMPOUNDS = {
    "acousticguitar": "acoustic guitar",
    "electricguitar": "electric guitar",
    "classicalguitar": "classical guitar",
    "drummachine": "drum machine",
    "easylistening": "easy listening",
    "electricpiano": "electric piano",
    "popfolk": "pop folk",
    "poprock": "pop rock",
    "singersongwriter": "singer-songwriter",
    "hiphop": "hip hop",
    "drumnbass": "drum and bass",
    "triphop": "trip hop",
    "newage": "new age",
    "hardrock": "hard rock",
    "punkrock": "punk rock",
}
