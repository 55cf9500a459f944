"""Read the rows of caption files: which sound file each names, and its captions.

A row that cannot be used is set aside and counted, since one of a million must not stop a build.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmttm.corpus.caption_formats import Fault, read_records
from ssmttm.corpus.caption_keys import LICENCE_KEYS, NAME_KEYS, START_KEYS, captions_of, first_of, key_of
from ssmttm.corpus.manifest import SetAside
from ssmttm.errors import InputError

_MOST_NAMED = 3
"""Rows that are named for each reason."""


@dataclass(frozen=True)
class CaptionRow:
    """One caption of a row of a caption file."""

    name: str
    """Name that the row gives its sound file: a path, a name without the suffix or an id; not checked."""
    caption: str
    title: str
    licence: str
    where: str
    """Place of the row in its file, for messages."""
    start: str = ""
    """Second at which the clip begins in its video, for names of such clips."""
    group_keys: tuple[str, ...] = ()
    """Facts as `kind:value` that keep tracks together."""
    split: str = ""
    """Split that the row names."""


About = Callable[[Mapping[str, Any]], tuple[tuple[str, ...], str]]
"""Returns the group keys and the split of a record."""


def says_nothing(_: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return no facts of a record."""
    return (), ""


class Faults:
    """Rows that are set aside, counted by file and reason."""

    def __init__(self) -> None:
        self._count: dict[tuple[str, str], int] = {}
        self._first: dict[tuple[str, str], list[str]] = {}

    def add(self, file: str, where: str, reason: str) -> None:
        """Count a row of a file; `reason` is the rest of a sentence about it."""
        key = (file, reason)
        self._count[key] = self._count.get(key, 0) + 1
        if len(first := self._first.setdefault(key, [])) < _MOST_NAMED:
            first.append(where)

    def found(self) -> tuple[SetAside, ...]:
        """Return what was counted, the commonest reason first."""
        ordered = sorted(self._count.items(), key=lambda item: (-item[1], item[0]))
        return tuple(
            SetAside(file=file, reason=reason, rows=count, first=tuple(self._first[file, reason]))
            for (file, reason), count in ordered
        )

    def __str__(self) -> str:
        return "; ".join(
            f"{one.file}, {one.first[0]}: {one.reason}" + (f" ({one.rows:,} rows)" if one.rows > 1 else "")
            for one in self.found()[:_MOST_NAMED]
        )


def read_captions(
    path: Path, *, named: bool = True, faults: Faults | None = None, about: About = says_nothing
) -> Iterator[CaptionRow]:
    """Yield the captions of a caption file, row by row.

    named: require that every row names a sound file, and yield all captions of a row; otherwise rows are prompts, whose
    name may be empty, and a row with several captions is the prompt of the first. faults: collects the rows that cannot
    be used; without it the first of them raises InputError that names file and row, as does a file of another form.
    about: reads the facts that keep tracks together, and the split.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such captions file")
    for where, record in read_records(path, named=named):
        rows = _caption_rows(where, record, named=named, about=about)
        if isinstance(rows, list):
            yield from rows
        elif faults is None:
            raise InputError(f"{path}, {where}: {rows.reason}")
        else:
            faults.add(path.name, where, rows.reason)


def _caption_rows(where: str, record: Any, *, named: bool, about: About) -> list[CaptionRow] | Fault:
    if isinstance(record, Fault):
        return record
    if not isinstance(record, dict):
        return Fault(f"should be a record with path and caption, is {type(record).__name__}")
    keyed = {key_of(key): value for key, value in record.items()}
    name = first_of(keyed, NAME_KEYS)
    captions = captions_of(keyed)
    if not name and named:
        return Fault(f"names no file; one of {', '.join(NAME_KEYS)} is needed")
    if not captions and {"duration", "sample_rate"} <= keyed.keys():
        return Fault(
            "has no caption but AudioCraft's facts; without `captions`, the song.json beside song.wav is read"
        )
    if not captions:
        return Fault("has no caption")
    title, licence, start = (first_of(keyed, keys) for keys in (("title",), LICENCE_KEYS, START_KEYS))
    group_keys, split = about(record)
    facts = {"title": title, "licence": licence, "where": where, "start": start}
    return [
        CaptionRow(name=name, caption=caption, group_keys=group_keys, split=split, **facts)
        for caption in (captions if named else captions[:1])
    ]
