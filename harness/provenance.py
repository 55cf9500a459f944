"""Which code runs: its commit, and a digest of its sources that is the same wherever they lie.

The digest names a state of the code whether it lies in a git checkout, in a copy of one or in a wheel. Taking it reads
every source once, about a megabyte: cheap enough for each job to compare itself with its submission.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
"""Where the packages lie: a checkout, a copy of one, or site-packages."""
PACKAGES = ("harness", "ssmttm", "analysis")
SOURCES = frozenset({".py", ".html"})
"""Endings of the files that decide what the packages do."""


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Git commit of the code that runs, with a + where the checkout has changes; None outside a checkout."""
    if not is_checkout():
        return None
    return f"{git('rev-parse', 'HEAD')}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}"


@lru_cache(maxsize=1)
def is_checkout() -> bool:
    """Whether the code lies in a git checkout of its own, with at least one commit.

    A wheel in an environment inside somebody's repository does not.
    """
    top = git("rev-parse", "--show-toplevel")
    return (
        top is not None
        and Path(top).resolve() == HOME
        and git("ls-tree", "--name-only", "HEAD", "harness/__init__.py") == "harness/__init__.py"
    )


def source_files(home: Path = HOME) -> dict[str, str]:
    """The sha256 of every source of the packages below `home`, by path."""
    found = {}
    for package in PACKAGES:
        for folder, folders, files in os.walk(home / package):
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            for name in files:
                path = Path(folder, name)
                # An editor's lock file is a hidden link to nowhere that bears a source's ending.
                if path.suffix not in SOURCES or name.startswith(".") or not path.is_file():
                    continue
                with suppress(FileNotFoundError):  # removed since it was listed
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    found[path.relative_to(home).as_posix()] = digest
    return dict(sorted(found.items()))


def code_state(sources: Mapping[str, str]) -> str:
    """What a state of the code is called: 12 hex digits of a digest over its sources."""
    lines = "".join(f"{digest} {path}\n" for path, digest in sorted(sources.items()))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:12]


@lru_cache(maxsize=1)
def running_code() -> str | None:
    """The state of this process's code, None where it cannot be read.

    Ask when the process starts, for the files may change under it later.
    """
    try:
        return code_state(source_files())
    except OSError:
        return None


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(*arguments: str, **environment: str) -> str | None:
    """What git says of the code's own folder; None where it is not there or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(HOME), *arguments],
            capture_output=True,
            check=True,
            env={**os.environ, **environment},
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="surrogateescape").strip("\n")
