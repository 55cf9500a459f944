"""Python imports this from PYTHONPATH at its start: each program that it starts is a line in $PROGRAMS_STARTED."""

from __future__ import annotations

import os
import sys

STARTS = {"subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"}


def note(event: str, arguments: tuple[object, ...]) -> None:
    if event in STARTS:
        # Not by pathlib, which every process of this environment would import.
        with open(os.environ["PROGRAMS_STARTED"], "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(f"{arguments[0]}\n")


if "PROGRAMS_STARTED" in os.environ:
    sys.addaudithook(note)
