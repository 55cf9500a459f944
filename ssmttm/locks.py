"""Locks between processes: the system's where the file system has them, else a lease that its holder keeps renewing."""

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from filelock import BaseFileLock, FileLock

from ssmttm.files import check_links

NONE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Error numbers of a file system without locks, such as Lustre without `flock` or NFS without its lock daemon."""
LEASE_SECONDS = 30.0
"""Time without a renewal after which another process may take a lease: its holder's host may be dead."""

INSTANT = 0.2
"""Time in which a lock counts as free in spite of a process that only looks whether it is held."""
_KNOWN: dict[int, bool] = {}
"""True for each device whose file system has locks."""


def file_lock(path: Path, *, wait: bool = True) -> BaseFileLock:
    """Return the lock of a file, made with its folder if missing; without `wait` acquiring it raises filelock.Timeout.

    On a file system without locks it is a lease: who finds it held waits for LEASE_SECONDS even without `wait`, and
    takes it if its holder has not renewed it. What a lease protects has to bear that its former holder still runs.
    """
    check_links(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not has_locks(path.parent):
        from filelock import SoftFileLease

        seconds = -1.0 if wait else 1.5 * LEASE_SECONDS
        return SoftFileLease(f"{path}.lease", timeout=seconds, lease_duration=LEASE_SECONDS)
    return FileLock(path, timeout=-1.0 if wait else INSTANT, fallback_to_soft=False)


def has_locks(folder: Path) -> bool:
    """True if the file system of a folder has locks between processes."""
    device = folder.stat().st_dev
    if device not in _KNOWN:
        _KNOWN[device] = _shared_lock(folder) != "none"
    return _KNOWN[device]


def is_held(path: Path) -> bool:
    """True if a process, on this host or another, holds the lock of a file; asked without the right to write it."""
    if not has_locks(path.parent):
        with suppress(FileNotFoundError):
            return time.time() - Path(f"{path}.lease").stat().st_mtime < LEASE_SECONDS
        return False
    return path.exists() and _shared_lock(path) == "held"


def _shared_lock(path: Path) -> Literal["free", "held", "none"]:
    """Try a lock that only excludes a holder's, for an instant."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno in NONE:
            return "none"
        raise
    finally:
        os.close(descriptor)
    return "free"
