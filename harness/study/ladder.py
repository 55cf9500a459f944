"""Ladders: an entry of a study's sizes that lists widths, depths or parameters makes a size of each.

New rungs rename no others: `ladder-d256` has width 256, `ladder-b6` 6 blocks, `ladder-72M` 72 million parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ssmttm.model.sizes import short_count


def replace_ladders(sizes: Any) -> Any:
    """Return the sizes with each ladder replaced by its rungs; raises ValueError for a ladder that is ambiguous."""
    if not isinstance(sizes, Mapping):
        return sizes
    found: dict[str, Any] = {}
    for name, size in sizes.items():
        lists = [key for key in LISTED if isinstance(size, Mapping) and isinstance(size.get(key), list)]
        if len(lists) > 1:
            raise ValueError(
                f"{name}: a ladder lists one of {', '.join(LISTED)}, but this one lists {' and '.join(lists)}"
            )
        made = _rungs_of(name, size, lists[0]) if lists else {name: size}
        for rung in made.keys() & found.keys():
            raise ValueError(f"{name}: two sizes are called {rung}; rename the ladder")
        found |= made
    return found


def _rungs_of(name: str, size: Mapping[str, Any], key: str) -> dict[str, Any]:
    entries = size[key]
    if not entries:
        raise ValueError(f"{name}.{key}: []: is empty; name at least one")
    made = {f"{name}-{LISTED[key](entry)}": {**size, key: entry} for entry in entries}
    if len(made) < len(entries):
        raise ValueError(f"{name}.{key}: {entries}: lists one size twice")
    return made


LISTED: Mapping[str, Callable[[Any], str]] = {
    "d_model": lambda entry: f"d{entry}",
    "n_blocks": lambda entry: f"b{entry}",
    "n_params": lambda entry: (
        short_count(entry) if isinstance(entry, int | float) and entry > 0 else str(entry)
    ),
}
"""Keys that a ladder may list, with the function that names a rung."""
