"""Programs that tests and benchmarks put on PATH before the machine's own, and the memory that a program takes."""

import os
import shutil
import subprocess
import sys
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


def peak_mib(*arguments: object) -> float:
    """Run the command `ssmscale`; return its peak resident memory, and raise CalledProcessError if it fails."""
    command = [sys.executable, "-m", "harness", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as program:
        _, status, used = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
    if program.returncode:
        raise subprocess.CalledProcessError(program.returncode, command)
    return used.ru_maxrss / 1024
