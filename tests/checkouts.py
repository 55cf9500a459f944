"""A checkout of the harness that a test may edit: copies of the packages in a git repository of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE

PARTS = ("harness", "ssmttm", "analysis", "slurm")


def make_checkout(folder: Path) -> Path:
    """Copy the packages and commit them."""
    for part in PARTS:
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".gitignore").write_text("__pycache__/\nharness/made.py\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all of it")
    return folder


def git(folder: Path, *arguments: str) -> str:
    """Call git in a folder; returns its output."""
    author = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environment_of(checkout: Path) -> dict[str, str]:
    """Return the environment in which Python imports the harness from a checkout."""
    return {**os.environ, "PYTHONPATH": str(checkout)}


def python(checkout: Path, program: str, *arguments: object, **environment: str) -> str:
    """Run a program with the harness of a checkout; returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=checkout,
        env={**environment_of(checkout), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
