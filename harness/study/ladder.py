"""Ladders: one entry of a study's sizes that lists its widths, depths or parameters is a size for each of them.

A rung's name is derived from the ladder's and from what it lists, so that further rungs rename none: `ladder-d256` of
width 256, `ladder-b6` of 6 blocks, `ladder-72M` of 72 million parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ssmttm.model.sizes import short_count


def rungs(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes as written, each ladder replaced by its rungs; raises ValueError where that is not clear."""
    found: dict[str, Any] = {}
    for name, size in sizes.items():
        lists = [key for key in LISTED if isinstance(size, Mapping) and isinstance(size.get(key), list)]
        if len(lists) > 1:
            raise ValueError(
                f"{name}: a ladder lists one of {', '.join(LISTED)}, and not {' and '.join(lists)}"
            )
        made = _rungs_of(name, size, lists[0]) if lists else {name: size}
        for rung in made.keys() & found.keys():
            raise ValueError(f"{name}: {rung} is the name of two sizes; call the ladder something else")
        found |= made
    return found


def _rungs_of(name: str, size: Mapping[str, Any], key: str) -> dict[str, Any]:
    entries = size[key]
    if not entries:
        raise ValueError(f"{name}.{key}: []: is empty; name at least one")
    made = {f"{name}-{LISTED[key](entry)}": {**size, key: entry} for entry in entries}
    if len(made) < len(entries):
        raise ValueError(f"{name}.{key}: {entries}: names one size twice")
    return made


def _as_name(entry: Any) -> str:
    return short_count(entry) if isinstance(entry, int | float) and entry > 0 else str(entry)


LISTED: Mapping[str, Callable[[Any], str]] = {
    "d_model": lambda entry: f"d{entry}",
    "n_blocks": lambda entry: f"b{entry}",
    "n_params": _as_name,
}
"""Keys a ladder may list, and the name of a rung."""
