"""The code of a submission, written down: ROOT/studies/NAME/code/STATE.json and STATE.diff, one of each a state.

STATE is a digest of the sources, so what was submitted a hundred times with the same code is recorded once. The
record names a commit and holds the difference to it that give this code; where the code is an installed package, its
version. Either way it lists the digest of every source.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from harness.provenance import (
    HOME,
    PACKAGES,
    SOURCES,
    code_state,
    git,
    installed_version,
    is_checkout,
    source_files,
)
from harness.run import Frozen
from harness.rundir import write_atomically

LARGEST_FILE = 256 * 1024
LARGEST_DIFF = 8 * 1024 * 1024
"""Bytes of one changed file, and of all changes together, that are kept; beyond that they are named."""


class CodeRecord(Frozen):
    """What is known of one state of the code."""

    state: str
    version: str | None
    """Version of the installed package."""
    commit: str | None
    """Git commit it is based on; null where it lies in no checkout."""
    diff: str | None
    """File beside this one that `git apply` turns the commit into this code with; null where nothing differs."""
    left_out: Mapping[str, str]
    """Changed files the diff does not hold, each with the reason."""
    sources: Mapping[str, str]
    """The sha256 of every source."""


def record_code(study_dir: Path) -> str:
    """Write down the code as it is on disk, unless it is known; returns the name of its state."""
    folder = study_dir / "code"
    for _ in range(3):  # somebody may be editing it
        sources = source_files()
        state = code_state(sources)
        if (folder / f"{state}.json").exists():
            return state
        commit, diff, left_out = _difference(sources) if is_checkout() else (None, "", {})
        if source_files() == sources:
            break
    if diff:
        write_atomically(folder / f"{state}.diff", diff.encode(errors="surrogateescape"))
    record = CodeRecord(
        state=state,
        version=installed_version("ssmscale"),
        commit=commit,
        diff=f"{state}.diff" if diff else None,
        left_out=left_out,
        sources=sources,
    )
    write_atomically(folder / f"{state}.json", record.model_dump_json(indent=1) + "\n")
    return state


@contextmanager
def index_of_everything() -> Iterator[dict[str, str]]:
    """An index of git's own beside the user's: what HEAD has, and the packages' new sources that git does not ignore.

    Yields the environment that has git use it.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        git("read-tree", "HEAD", **environment)
        new = git("ls-files", "-z", "--others", "--exclude-standard", "--", *PACKAGES, **environment)
        added = [name for name in (new or "").split("\0") if Path(name).suffix in SOURCES]
        if added:
            git("add", "--intent-to-add", "--", *added, **environment)
        yield environment


def _difference(sources: Mapping[str, str]) -> tuple[str | None, str, dict[str, str]]:
    """The commit, the packages' difference to it, and what that leaves out."""
    plain = ("--no-ext-diff", "--no-textconv", "--no-renames", "--no-color", "--full-index")
    with index_of_everything() as environment:
        known = set((git("ls-files", "-z", "--", *PACKAGES, **environment) or "").split("\0"))
        left_out = {name: "ignored by git" for name in sources if name not in known}
        wanted = []
        changes = git("diff", *plain, "--numstat", "-z", "HEAD", "--", *PACKAGES, **environment) or ""
        for change in filter(None, changes.split("\0")):
            added, _, name = change.split("\t", 2)
            if added == "-":
                left_out[name] = "binary"
            elif (HOME / name).is_file() and (HOME / name).stat().st_size > LARGEST_FILE:
                left_out[name] = f"larger than {LARGEST_FILE} bytes"
            else:
                wanted.append(name)
        prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
        diff = git("diff", *plain, *prefixes, "HEAD", "--", *wanted, **environment) if wanted else ""
        if diff is None or len(diff) > LARGEST_DIFF:
            left_out |= dict.fromkeys(wanted, f"of changes beyond {LARGEST_DIFF} bytes")
            diff = ""
    return git("rev-parse", "HEAD"), diff + "\n" if diff else "", left_out
