"""The code that runs: its commit, a digest of its sources, and a record of both for each submission.

The digest, called STATE, identifies the code in a git checkout, a copy of one or a wheel; each job compares it with its
submission's. ROOT/studies/NAME/code holds STATE.json and STATE.diff for every STATE that was submitted.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness.common.disk import write_atomically
from harness.record.root import write_model
from harness.study.run import Frozen
from ssmttm.files import sha256_file

HOME = Path(__file__).resolve().parents[2]
"""Folder of the packages: a checkout, a copy of one, or site-packages."""
PACKAGES = ("harness", "ssmttm", "analysis")
SOURCES = frozenset({".py", ".html"})
"""Suffixes of the files that decide what the packages do."""


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Return the git commit of the running code, with a + if the checkout has changes; None outside a checkout."""
    if not is_checkout():
        return None
    return f"{git('rev-parse', 'HEAD')}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}"


@lru_cache(maxsize=1)
def is_checkout() -> bool:
    """True if the code is in its own git checkout with a commit, not in an environment inside another repository."""
    top = git("rev-parse", "--show-toplevel")
    return (
        top is not None
        and Path(top).resolve() == HOME
        and git("ls-tree", "--name-only", "HEAD", "harness/__init__.py") == "harness/__init__.py"
    )


def source_files(home: Path = HOME) -> dict[str, str]:
    """Return the SHA-256 of every source of the packages below `home`, by path."""
    found = {}
    for package in PACKAGES:
        for folder, folders, files in os.walk(home / package):
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            for name in files:
                path = Path(folder, name)
                # An editor's lock file is a hidden, broken link with the suffix of a source.
                if path.suffix not in SOURCES or name.startswith(".") or not path.is_file():
                    continue
                with suppress(FileNotFoundError):  # removed since it was listed
                    found[path.relative_to(home).as_posix()] = sha256_file(path)
    return dict(sorted(found.items()))


def code_state(sources: Mapping[str, str]) -> str:
    """Return the state of the code: 12 hex digits of a digest over its sources."""
    lines = "".join(f"{digest} {path}\n" for path, digest in sorted(sources.items()))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:12]


@lru_cache(maxsize=1)
def running_code() -> str | None:
    """Return the state of this process's code, None if it cannot be read; call it before the files may change."""
    try:
        return code_state(source_files())
    except OSError:
        return None


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(*arguments: str, **environment: str) -> str | None:
    """Run git in the code's folder and return its output; None if git is missing or fails.

    The folder may be another user's: its code runs already.
    """
    try:
        done = subprocess.run(
            ["git", "-c", f"safe.directory={HOME}", "-C", str(HOME), *arguments],
            capture_output=True,
            check=True,
            env={**os.environ, **environment},
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="surrogateescape").strip("\n")


LARGEST_FILE = 256 * 1024
LARGEST_DIFF = 8 * 1024 * 1024
"""Bytes of one changed file, and of all changes together, up to which a record holds them."""


class CodeRecord(Frozen):
    """Record of one state of the code."""

    state: str
    version: str | None
    commit: str | None
    """Git commit it is based on; null outside a checkout."""
    diff: str | None
    """File beside this one with the changes for `git apply`; null if nothing differs from the commit."""
    left_out: Mapping[str, str]
    """Changed files that are not in the diff, each with the reason."""
    sources: Mapping[str, str]
    """SHA-256 of every source."""


def record_code(study_dir: Path) -> str:
    """Record the code as it is on disk, unless that was done before, and return its state."""
    folder = study_dir / "code"
    for _ in range(3):  # an editor may change it meanwhile
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
    write_model(folder / f"{state}.json", record)
    return state


@contextmanager
def index_of_everything() -> Iterator[dict[str, str]]:
    """Make a temporary git index of HEAD and the packages' new sources, and yield the environment that selects it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        git("read-tree", "HEAD", **environment)
        new = git("ls-files", "-z", "--others", "--exclude-standard", "--", *PACKAGES, **environment)
        added = [name for name in (new or "").split("\0") if Path(name).suffix in SOURCES]
        if added:
            git("add", "--intent-to-add", "--", *added, **environment)
        yield environment


def _difference(sources: Mapping[str, str]) -> tuple[str | None, str, dict[str, str]]:
    """Return the commit, the packages' difference to it, and the files left out of that, each with the reason."""
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
