"""Read a published split: which of its splits each track is in.

It is one of these: a table (CSV, TSV, JSON, JSONL) with columns for the file and the split, or MusicCaps'
is_audioset_eval; a JSON mapping from split to files; one file a split in a folder, such as MTG-Jamendo's
`autotagging-train.tsv` or AudioCraft's `train/data.jsonl`; or one such file, which brings those beside it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from ssmttm.corpus.caption_formats import TABLES, Fault, read_records
from ssmttm.corpus.caption_keys import NAME_KEYS, key_of
from ssmttm.errors import InputError
from ssmttm.files import canonical_json, sha256_file

SPLIT_COLUMN = "split"
_COLUMNS = (SPLIT_COLUMN, "set", "subset", "partition", "fold", "is_audioset_eval")
SPLITS = {
    "train": ("train", "training", "tr"),
    "valid": ("valid", "validation", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluate", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
_WORD = re.compile(rf"(?:^|[-_. ])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})$", re.IGNORECASE)


def split_of(record: Mapping[str, Any], column: str | None) -> str:
    """Return the split that a record names: train, valid, test, else its own word; empty if it names none.

    column: None for the first of the usual columns that the record has.
    """
    plain = {str(key).strip().lower(): value for key, value in record.items()}
    for key in (column.lower(),) if column else _COLUMNS:
        word = str(plain.get(key) if plain.get(key) is not None else "").strip().lower()
        if key.startswith("is_") and word in ("true", "false", "1", "0"):
            return "test" if word in ("true", "1") else "train"
        if word:
            return _SPLIT_OF.get(word, word)
    return ""


def published_files(path: Path) -> list[tuple[Path, str]]:
    """Return (file, split) of a published split, the split empty for a table of all; raises InputError if none is."""
    if path.is_dir():
        below = sorted(one for one in (*path.glob("*"), *path.glob("*/*")) if one.suffix.lower() in TABLES)
        found = [(one, split) for one in below if (split := _split_of_file(one, path))]
        if not found:
            raise InputError(
                f"{path}: holds no list of a split; expected files such as train.csv, set-test.tsv or valid/data.jsonl"
            )
        return found
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder; `splits` names it")
    match = _WORD.search(path.stem)
    if match is None:
        return [(path, "")]
    prefix = path.stem[: match.start(1)]
    beside = sorted(path.parent.glob(f"*{path.suffix}"))
    return [
        (one, _SPLIT_OF[other[1].lower()])
        for one in beside
        if (other := _WORD.search(one.stem)) and one.stem[: other.start(1)] == prefix
    ]


def published_hash(path: Path) -> str:
    """Return one sha256 of all files of a published split."""
    files = [[one.name, split, sha256_file(one)] for one, split in published_files(path)]
    return sha256(canonical_json(files).encode()).hexdigest()


def read_published(path: Path, find: Callable[[str], str | None]) -> dict[str, str]:
    """Return the splits of a published split by track; `find` returns the track that a name means, if there is one.

    Raises InputError if a file is wrong, if it names no track, or if a track is in two splits.
    """
    found: dict[str, str] = {}
    unknown = ""
    for file, split in published_files(path):
        for where, name, named in _named(file, split):
            unknown = unknown or ("" if named in SPLITS else f"{file}, {where}: split is {named!r}")
            track = _find(name, find)
            if track is None or named not in SPLITS:
                continue
            if found.setdefault(track, named) != named:
                raise InputError(f"{file}, {where}: {name} is in {named}, but in {found[track]} before it")
    if not found:
        why = (
            f"{unknown}, none of train, valid and test"
            if unknown
            else f"{path}: names no track of the directory"
        )
        raise InputError(f"{why}; `splits` must list its files with their splits")
    return found


def _named(file: Path, split: str) -> Iterator[tuple[str, str, str]]:
    """Yield (place, name, split) of each row of a file."""
    for where, record in read_records(file, captioned=False):
        if isinstance(record, Fault):
            raise InputError(f"{file}, {where}: {record.reason}")
        if not isinstance(record, dict):
            raise InputError(f"{file}, {where}: should be a record with file and split")
        plain = {key_of(key): value for key, value in record.items()}
        whole = _SPLIT_OF.get(str(record.get("path", "")).lower()) if not split else None
        if whole and isinstance(names := record.get("caption"), list):  # a JSON mapping from split to files
            yield from ((where, str(name), whole) for name in names)
            continue
        name = next((str(plain[key]).strip() for key in NAME_KEYS if plain.get(key)), "")
        if not name and file.suffix.lower() == ".txt":
            name = str(plain.get("caption", "")).strip()
        if not name:
            raise InputError(f"{file}, {where}: names no file; one of {', '.join(NAME_KEYS)} is needed")
        named = split or split_of(plain, None)
        if not named and isinstance(plain.get("caption"), str):  # a JSON mapping from file to split
            word = plain["caption"].strip().lower()
            named = _SPLIT_OF.get(word, word)
        if not named:
            raise InputError(f"{file}, {where}: names no split; one of {', '.join(_COLUMNS)} is needed")
        yield where, name, named


def _find(name: str, find: Callable[[str], str | None]) -> str | None:
    """Return the track of a name, whose folders may be those of another machine."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    tails = ("/".join(parts[start:]) for start in range(len(parts)) if ".." not in parts[start:])
    return next((track for tail in tails if (track := find(tail)) is not None), None)


def _split_of_file(file: Path, root: Path) -> str:
    match = _WORD.search(file.stem)
    if match is None and file.parent != root:
        match = _WORD.fullmatch(file.parent.name)
    return _SPLIT_OF[match[1].lower()] if match else ""
