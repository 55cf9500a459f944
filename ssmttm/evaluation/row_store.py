"""Arrays on disk with a row for each item, written some items at a time, so that a kill loses only unwritten rows.

All rows can be computed again: a damaged file is reported and deleted, and its rows are missing again.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssmttm.errors import InputError
from ssmttm.evaluation.measure import Arrays
from ssmttm.files import read_arrays, write_atomically

_ITEMS = "items"


class RowStore:
    """A folder of .npz files, each with the rows of some items.

    Several processes may add rows at once; each sees those that were there when it first looked, and its own.

    warn: called with a message for every damaged file.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self._warn = folder, warn

    def missing(self, items: int | Iterable[int]) -> list[int]:
        """Return those of some items without rows; n stands for 0 to n - 1."""
        wanted = range(items) if isinstance(items, int) else items
        return [item for item in wanted if item not in self._files]

    def add(self, items: Sequence[int], arrays: Arrays) -> None:
        """Write the rows of missing items, in the order of the arrays' first axis."""
        buffer = io.BytesIO()
        rows: dict[str, Any] = {_ITEMS: np.asarray(items, dtype=np.int64), **arrays}
        np.savez_compressed(buffer, **rows)
        path = self.folder / f"{items[0]:06d}-{len(items)}.npz"
        write_atomically(path, buffer.getvalue())
        self._files.update(dict.fromkeys(items, path))

    def read(self, items: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Return the rows of some items in the given order; None for all items, by number."""
        wanted = sorted(self._files) if items is None else list(items)
        parts = [_read(path) for path in dict.fromkeys(self._files[item] for item in wanted)]
        numbers = np.concatenate([part.pop(_ITEMS) for part in parts])
        order = np.argsort(numbers, kind="stable")
        places = order[np.searchsorted(numbers[order], wanted)]
        return {name: np.concatenate([part[name] for part in parts])[places] for name in parts[0]}

    @cached_property
    def _files(self) -> dict[int, Path]:
        """The file of each item."""
        found = {}
        for path in sorted(self.folder.glob("[0-9]*.npz")):
            try:
                items = _read(path)[_ITEMS].tolist()
            except _DamagedError as error:
                path.unlink(missing_ok=True)
                self._warn(f"{path}: was damaged ({error}); its rows are computed again")
            else:
                found.update(dict.fromkeys(items, path))
        return found


class _DamagedError(Exception):
    """A file exists and cannot be read."""


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return every array of a file; raises _DamagedError, and InputError if the disk fails."""
    try:
        arrays = read_arrays(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except InputError as error:
        raise _DamagedError(str(error).removeprefix(f"{path}: ")) from None
    lengths = {array.shape[:1] for array in arrays.values()}
    if _ITEMS not in arrays or len(arrays) < 2 or len(lengths) > 1:
        raise _DamagedError(f"its arrays are {', '.join(arrays) or 'missing'}, of {sorted(lengths)} rows")
    return arrays
