"""Which code ran: the commit, for journals and reports."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Git commit of the code that runs, with a + where the checkout has changes; None outside a checkout."""
    head = _git("rev-parse", "HEAD")
    return (
        None
        if head is None
        else head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    )


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
