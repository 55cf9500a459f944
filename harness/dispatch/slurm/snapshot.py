"""A copy of the checkout for the jobs of a submission, so that editing the checkout does not affect queued jobs.

submitit's RsyncSnapshot makes ROOT/studies/NAME/code/STATE/. This module handles what RsyncSnapshot does not: deleted
files, on which it fails; files of the last commit that the checkout does not have; new sources that were never added
to git; two submissions at once, or one killed half-way. Before any job runs from a copy, its contents are compared
with the state it is named after.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from harness.record.provenance import HOME, code_state, git, index_of_everything, is_checkout, source_files
from harness.record.trust import believe
from ssmttm.errors import InputError


def check_copying(study_dir: Path) -> None:
    """Raise InputError if no copy can be made, or Python could not import from it."""
    if not is_checkout():
        raise InputError(
            f"--snapshot: {HOME} is not a git checkout of the harness; submit with --no-snapshot, and do not change "
            "the installed package while jobs wait"
        )
    if shutil.which("rsync") is None:
        raise InputError("--snapshot: rsync is not installed here; install it, or submit with --no-snapshot")
    if os.pathsep in str(study_dir.absolute()):
        raise InputError(
            f"--root: {study_dir.absolute()}: --snapshot cannot be used, because Python cannot import from a path "
            f"with {os.pathsep!r} in it; choose another path"
        )


def copy_code(study_dir: Path, state: str) -> Path:
    """Return the copy of this state of the code, made if there is none; raises InputError if it cannot be made."""
    folder = study_dir.absolute() / "code"
    copy = folder / state
    if not copy.is_dir():
        draft = folder / f".{state}.{uuid.uuid4().hex[:8]}"
        try:
            _take(draft)
            _check(draft, state, "the code changed while it was copied; submit again")
            for path in (draft, *draft.rglob("*")):
                if not path.is_symlink():
                    path.chmod(path.stat().st_mode & ~0o022)
            draft.rename(copy)
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"--snapshot: {copy}: {shlex.join(map(str, error.cmd))} ended with {error.returncode}"
            ) from error
        except OSError:
            if not copy.is_dir():  # else another submission made it first
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    for path in (copy, *copy.rglob("*.py"), *(path for path in copy.rglob("*") if path.is_dir())):
        believe(path, "the code that jobs run", "move the copy away, and submit again")
    _check(
        copy, state, "the files differ from the code they are named after; move them away, and submit again"
    )
    os.utime(copy)  # `prune` keeps copies that were used lately
    return copy


def running_from(copy: Path, command: Sequence[str]) -> str:
    """Return the shell line that runs a Python command with the packages of a copy, from any directory."""
    path = shlex.quote(str(copy))
    return f'PYTHONSAFEPATH=1 PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}" {shlex.join(command)}'


def _take(draft: Path) -> None:
    from submitit.helpers import RsyncSnapshot, environment_variables

    # RsyncSnapshot would clone by itself, but that overwrites the index it reads at the same time.
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{HOME}", str(draft)], check=True)
    with index_of_everything() as index:
        gone = git("ls-files", "-z", "--deleted", **index)
        for name in filter(None, (gone or "").split("\0")):
            git("update-index", "--force-remove", "--", name, **index)
        listed = set((git("ls-files", "-z", **index) or "").split("\0"))
        ignored = [name for name in source_files() if name not in listed]
        plain_names = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "core.quotePath",
            "GIT_CONFIG_VALUE_0": "false",
        }
        with (
            environment_variables(**index, **plain_names),
            RsyncSnapshot(draft, root_dir=HOME, include=ignored),
        ):
            pass
    for name in source_files(draft).keys() - source_files().keys():
        (draft / name).unlink()


def _check(copy: Path, state: str, otherwise: str) -> None:
    if code_state(source_files(copy)) != state:
        raise InputError(f"--snapshot: {copy}: {otherwise}")
