"""What a worker prints goes to files, and their disk may be full: then it is lost, and nothing else is."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


def print_traceback() -> None:
    """Print the traceback of the exception being handled, where that can be printed."""
    with contextlib.suppress(OSError):
        traceback.print_exc()
        sys.stderr.flush()


def flush_or_drop() -> None:
    """Empty the buffers of standard output and error; what has no room is dropped, and so is what follows it.

    Python ends with status 120 where it finds a buffer it cannot empty.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            stream.flush()


def last_line(path: Path) -> str:
    """The last thing a log says; "nothing" where it says nothing."""
    with contextlib.suppress(OSError):
        lines = [
            line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        return lines[-1].strip()[:300] if lines else "nothing"
    return "nothing"


def end_at_once(status: int) -> NoReturn:
    """End this process when its exit handlers have run, without taking apart what it imported.

    Python would free every object of torch's and DeepSpeed's first, 2 s of a core during which nobody is served.
    """
    atexit._run_exitfuncs()
    flush_or_drop()
    os._exit(status)


@contextlib.contextmanager
def sent_to(file: Path) -> Iterator[None]:
    """Append standard output and error to a file during the block. Raises OSError where it cannot be opened."""
    flush_or_drop()
    kept = os.dup(1), os.dup(2)
    try:
        with file.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        yield
    finally:
        flush_or_drop()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
