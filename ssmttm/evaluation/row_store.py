"""Arrays on disk with a row an item, written some items at a time: what was written before a kill is there after it."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssmttm.corpus.writer import write_atomically
from ssmttm.errors import InputError
from ssmttm.evaluation.measure import Arrays

_ITEMS = "items"


class RowStore:
    """A folder of .npz files, each with the rows of some items; for one writer at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def missing(self, n: int) -> list[int]:
        """Which of the items 0 to n - 1 are not held."""
        return [item for item in range(n) if item not in self._files]

    def add(self, items: Sequence[int], arrays: Arrays) -> None:
        """Keep the rows of items that were missing; the arrays' first axis is theirs."""
        buffer = io.BytesIO()
        rows: dict[str, Any] = {_ITEMS: np.asarray(items, dtype=np.int64), **arrays}
        np.savez_compressed(buffer, **rows)
        path = self.folder / f"{items[0]:06d}-{len(items)}.npz"
        write_atomically(path, buffer.getvalue())
        self._files.update(dict.fromkeys(items, path))

    def read(self, items: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The rows of some items in the order asked for; of all, by their numbers, where none are named."""
        wanted = sorted(self._files) if items is None else list(items)
        parts = [_read(path) for path in dict.fromkeys(self._files[item] for item in wanted)]
        numbers = np.concatenate([part.pop(_ITEMS) for part in parts])
        order = np.argsort(numbers, kind="stable")
        places = order[np.searchsorted(numbers[order], wanted)]
        return {name: np.concatenate([part[name] for part in parts])[places] for name in parts[0]}

    @cached_property
    def _files(self) -> dict[int, Path]:
        """Which file holds an item."""
        found = {}
        for path in sorted(self.folder.glob("[0-9]*.npz")):
            found.update(dict.fromkeys(_read(path, _ITEMS)[_ITEMS].tolist(), path))
        return found


def _read(path: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of those names, all where none is given."""
    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in names or held.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: is damaged ({error}); remove it, and it is made again") from None
