"""Programs that tests and benchmarks put on PATH before the machine's own."""

import shutil
from pathlib import Path


def write_program(path: Path, script: str) -> Path:
    """Write an executable shell script, and its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def count_calls(folder: Path, told: Path, *programs: str) -> None:
    """Put wrappers of the machine's programs into a folder; each call writes a line to the file `told`."""
    for program in programs:
        write_program(folder / program, f'echo {program} >> "{told}"\nexec {shutil.which(program)} "$@"')
