"""Read the records of a caption file, whatever its form: CSV, TSV, JSON, JSON lines, Parquet, or a caption a line.

A damaged record does not hide the others: a `Fault` stands in its place. InputError is for files none of whose records
can be read: not text, not of the form that the ending promises.
"""

import csv
import gzip
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ssmttm.corpus.caption_keys import CAPTION_KEYS, NAME_KEYS, is_caption, key_of
from ssmttm.corpus.tag_captions import sentence_from_tags
from ssmttm.errors import InputError
from ssmttm.files import parse_json

MAX_LINE = 2**20
"""Most characters of a line."""
_MAX_JSON_BYTES = 2**28
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
"""Endings of files that list tracks."""
_MAX_COLUMNS = 1000
_DELIMITERS = ",;\t|"
_JAMENDO = ["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"]


@dataclass(frozen=True)
class Fault:
    """A record that cannot be read."""

    reason: str
    """The rest of a sentence about it: `is not valid JSON`."""


Record = tuple[str, Any]
"""The place of a record in its file, for messages, and the record or a Fault."""

_TOO_LONG = Fault(f"is longer than {MAX_LINE:,} characters")
_NOT_JSON = Fault("is not valid JSON")


def read_records(path: Path, *, named: bool = True, captioned: bool = True) -> Iterator[Record]:
    """Yield (place, record) of each row; raises InputError that names the file if it is not of a known form.

    named, captioned: require that a table has a column for the file, and one for the caption.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    try:
        if suffix in (".csv", ".tsv"):
            yield from _table(path, named=named, captioned=captioned)
        elif suffix == ".json":
            yield from _json(path)
        elif suffix in (".jsonl", ".ndjson"):
            yield from _json_lines(path)
        elif suffix == ".parquet":
            yield from _parquet(path)
        elif suffix == ".txt":
            yield from _captions_a_line(path)
        else:
            raise InputError(
                f"{path}: captions are read from .csv, .tsv, .json, .jsonl, .parquet or .txt (also .gz), not "
                f"{suffix or 'a name without an ending'}"
            )
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}{_where_not_text(path)}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _table(path: Path, *, named: bool, captioned: bool) -> Iterator[Record]:
    """Yield the rows of a table whose first line names the columns, or of MTG-Jamendo's TSV."""
    csv.field_size_limit(MAX_LINE)
    with closing(_lines(path, newline="")) as file:
        lines = enumerate(file, start=1)
        number, head = _first_line(lines)
        delimiter = ""
        if head[:4].lower() == "sep=" and len(head) > 4:  # Excel's
            delimiter = head[4].strip("\r\n")
            number, head = _first_line(lines)
        if number and not head:
            raise InputError(f"{path}, line {number}: {_TOO_LONG.reason}; it must name the columns")
        if not head:
            raise InputError(f"{path}: is empty; its first line must name the columns")
        if head.rstrip("\r\n").split("\t")[:6] == _JAMENDO:
            yield from _jamendo(lines)
            return
        try:
            delimiter = delimiter or max(_DELIMITERS, key=lambda one: _fitness(_split(head, one)))
            header = _split(head, delimiter)
        except (
            csv.Error,
            TypeError,
            ValueError,
        ) as error:  # the latter two: of a delimiter that cannot be one
            raise InputError(f"{path}, line {number}: not CSV: {error}") from None
        yield from _rows(
            lines, _columns(f"{path}, line {number}", header, named=named, captioned=captioned), delimiter
        )


def _first_line(lines: Iterator[tuple[int, str]]) -> tuple[int, str]:
    """Return (number, line) of the next line that is not blank, (0, "") at the end; an overlong line is empty."""
    return next(((number, line) for number, line in lines if not line or line.strip()), (0, ""))


def _fitness(columns: Sequence[str]) -> tuple[bool, bool, int]:
    keys = {key_of(column) for column in columns}
    return any(map(is_caption, keys)), bool(keys & set(NAME_KEYS)), len(columns)


def _split(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _columns(where: str, header: list[str], *, named: bool, captioned: bool) -> list[str]:
    """Return the columns of a header, made unique; raises InputError if it names no file or no caption."""
    if len(header) > _MAX_COLUMNS:
        raise InputError(f"{where}: has more than {_MAX_COLUMNS:,} columns; keep file and caption")
    keys = {key_of(column) for column in header}
    shown = ", ".join(repr(column[:40]) for column in header[:20])
    for is_there, what, wanted in (
        (not captioned or any(map(is_caption, keys)), "the caption", CAPTION_KEYS),
        (not named or bool(keys & set(NAME_KEYS)), "the file", NAME_KEYS),
    ):
        if not is_there:
            raise InputError(
                f"{where}: no column is named for {what} ({', '.join(wanted)}); this line must name the columns, and "
                f"says {shown}"
            )
    times: dict[str, int] = {}
    unique = []
    for column in header:
        before = times.get(column, 0)
        unique.append(f"{column}.{before}" if before else column)
        times[column] = before + 1
    return unique


def _rows(lines: Iterator[tuple[int, str]], columns: list[str], delimiter: str) -> Iterator[Record]:
    """Yield the rows below the header. A quotation mark without its partner costs one row, not those it embraces."""
    again: deque[tuple[int, str]] = deque()  # lines that a damaged row took in
    taken: list[tuple[int, str]] = []  # lines of the present row

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line[1]

    reader = csv.reader(feed(), delimiter=delimiter)
    while True:
        taken.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            fields = []
        where = f"line {taken[0][0]}"
        if not taken[0][1]:
            yield where, _TOO_LONG
        elif (len(taken) > 1 or not fields) and not _is_strict([line for _, line in taken], delimiter):
            yield where, Fault("is not CSV; close its quotation mark")
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(feed(), delimiter=delimiter)
        elif len(fields) > len(columns):
            yield where, Fault("has more fields than the header; quote the caption")
        elif any(fields):
            yield where, dict(zip(columns, fields, strict=False))


def _is_strict(lines: Sequence[str], delimiter: str) -> bool:
    """Return True if lines are one row with no character between a closing quotation mark and the next delimiter."""
    try:
        return sum(1 for _ in csv.reader(lines, delimiter=delimiter, strict=True)) == 1
    except csv.Error:
        return False


def _jamendo(lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    for number, line in lines:
        fields = line.rstrip("\r\n").split("\t")
        if not line:
            yield f"line {number}", _TOO_LONG
        elif len(fields) < 6:
            yield f"line {number}", Fault("has fewer than the 6 fields of a Jamendo row")
        else:
            artist, album, path = fields[1:4]
            facts = {"artist_id": artist, "album_id": album, "path": path}
            yield f"line {number}", {**facts, "caption": sentence_from_tags(fields[5:])}


def _json(path: Path) -> Iterator[Record]:
    with _opened(path) as file:
        content = file.read(_MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        raise InputError(
            f"{path}: has more than {_MAX_JSON_BYTES:,} bytes, the most that are read at once; save the captions as "
            "JSONL, with one record a line"
        )
    text = content.decode(_encoding(content[:4]))
    try:
        data = parse_json(text)
    except ValueError as error:
        if _begins_with_record(text):  # many programs name JSON lines .json
            yield from _json_lines(path)
            return
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if isinstance(data, list):
        yield from ((f"item {number}", value) for number, value in enumerate(data))
    elif not isinstance(data, dict):
        raise InputError(f"{path}: should be a mapping from file to caption, or a list of records")
    elif _is_record(data):
        yield from _as_columns(data)
    else:
        for key, value in data.items():
            yield f"key {key!r}", {"path": key, **(value if isinstance(value, dict) else {"caption": value})}


def _begins_with_record(text: str) -> bool:
    try:
        return isinstance(parse_json(text.lstrip().partition("\n")[0]), dict)
    except ValueError:
        return False


def _is_record(data: Mapping[str, Any]) -> bool:
    keys = {key_of(key) for key in data}
    return bool(keys & set(NAME_KEYS)) and any(map(is_caption, keys))


def _as_columns(data: Mapping[str, Any]) -> list[Record]:
    """Return the records of a table written by column, as pandas does, or the one record that the file is."""
    columns = {
        name: dict(enumerate(column)) if isinstance(column, list) else column for name, column in data.items()
    }
    if not all(isinstance(column, dict) for column in columns.values()):
        return [("the only record", data)]
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    return [(f"row {row}", {name: column.get(row) for name, column in columns.items()}) for row in rows]


def _json_lines(path: Path) -> Iterator[Record]:
    for where, line in _numbered(path):
        try:
            yield where, parse_json(line) if line else _TOO_LONG
        except ValueError:
            yield where, _NOT_JSON


def _captions_a_line(path: Path) -> Iterator[Record]:
    return ((where, {"caption": line} if line else _TOO_LONG) for where, line in _numbered(path))


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise InputError(
            f"{path}: reading Parquet needs pyarrow; install it, or save the captions as CSV"
        ) from None
    try:
        with ParquetFile(path) as file:
            leaves = [file.schema.column(n) for n in range(len(file.schema))]
            # Data sets of the hub keep the sound itself in a column of bytes.
            wanted = [
                leaf.path
                for leaf in leaves
                if leaf.physical_type != "BYTE_ARRAY" or leaf.logical_type.type != "NONE"
            ]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for record in batch.to_pylist():
                    yield f"row {number}", record
                    number += 1
    except ArrowException as error:
        raise InputError(f"{path}: not a whole Parquet file: {error}") from None


def _numbered(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, line) of the lines that are not blank; an overlong line is empty."""
    for number, line in enumerate(_lines(path), start=1):
        if not line or line.strip():
            yield f"line {number}", line


def _lines(path: Path, newline: str | None = None) -> Generator[str]:
    """Yield the lines of a text file, an empty text for an overlong one."""
    with _opened(path) as start:
        encoding = _encoding(start.read(4))
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with cast("IO[str]", opened(path, "rt", encoding=encoding, newline=newline)) as file:
        while line := file.readline(MAX_LINE + 1):
            if len(line) <= MAX_LINE:
                yield line
                continue
            while line and not line.endswith(("\n", "\r")):
                line = file.readline(MAX_LINE)
            yield ""


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb"))


def _encoding(start: bytes) -> str:
    """Return the encoding that a byte-order mark declares, else UTF-8."""
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _where_not_text(path: Path) -> str:
    """Return the first line that is not UTF-8, for a message."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            try:
                line.decode()
            except UnicodeDecodeError:
                return f", line {number}"
    return ""
