"""List the files of a directory and of the directories linked into it, each directory once.

A link may lead anywhere, since the user made the directory. A directory's own place goes before a link to it, so that a
link gives no file a second name, and a circle of links ends.
"""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ssmttm.corpus.manifest import Skipped


@dataclass
class Listing:
    """Files of a directory by their path in it, with their sizes in bytes, and what could not be looked at."""

    files: dict[str, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def list_files(root: Path, wanted: Callable[[str], bool]) -> Listing:
    """Return the files under `root` whose names are `wanted`, hidden ones left out; raises OSError if it cannot."""
    listing = Listing()
    seen: set[str] = set()
    links = [root]
    os.listdir(root)  # noqa: PTH208  # raises what os.walk would pass over
    while links:
        start = links.pop(0)
        if _is_new(start, seen):
            links += sorted(_walk(root, start, wanted, listing, seen))
    return listing


def _walk(
    root: Path, start: Path, wanted: Callable[[str], bool], listing: Listing, seen: set[str]
) -> list[Path]:
    """List the files under `start`; return the links to directories found there."""
    links = []

    def leave_out(path: Path, reason: str) -> None:
        listing.skipped.append(Skipped(track=_printable(path.relative_to(root).as_posix()), reason=reason))

    def unreadable(error: OSError) -> None:
        leave_out(Path(error.filename), f"cannot be listed: {error.strerror}")

    for folder, folders, names in os.walk(start, onerror=unreadable):
        linked = {name for name in folders if Path(folder, name).is_symlink()}
        links += [Path(folder, name) for name in linked]
        folders[:] = [
            name for name in sorted(folders) if name not in linked and _is_new(Path(folder, name), seen)
        ]
        for name in names:
            path = Path(folder, name)
            is_wanted = wanted(name) and not name.startswith(".")
            try:
                facts = path.stat()
            except OSError as error:
                # A broken link without an ending most likely led to a directory.
                if is_wanted or (path.is_symlink() and not path.suffix):
                    broken = path.is_symlink() and not isinstance(error, PermissionError)
                    leave_out(path, "its link is broken" if broken else f"unreadable: {error.strerror}")
                continue
            if is_wanted and stat.S_ISREG(facts.st_mode):
                listing.files[path.relative_to(root).as_posix()] = facts.st_size
    return links


def _is_new(folder: Path, seen: set[str]) -> bool:
    """Return True, and remember the directory, if it has not been seen before by whatever name."""
    real = os.path.realpath(folder)
    if real in seen:
        return False
    seen.add(real)
    return True


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
