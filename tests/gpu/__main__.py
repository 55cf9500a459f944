"""Check this machine's GPU: python -m tests.gpu [PHASE]... [--tiny] [--out FOLDER]

Every phase runs in a process of its own and prints lines that begin with PASS, FAIL or NOTE. All lines are kept in
FOLDER/check.txt, and the rest of the output in FOLDER/PHASE.log. The exit status is 1 if a line says FAIL. The whole
check is made for 12 minutes of one H200; `--tiny` rehearses the phases with small models, also without a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests import reaper
from tests.gpu.generation import generation
from tests.gpu.inside import leak, where
from tests.gpu.kernels import kernels
from tests.gpu.machine import doctor, machine
from tests.gpu.reference import reference
from tests.gpu.sizes import DEVICE, FULL, TINY, Size
from tests.gpu.speed import chunks, compiled, speed
from tests.gpu.studies import studies


class Phase(NamedTuple):
    """One part of the check."""

    run: Callable[[Size], None]
    most_seconds: float


PHASES = {
    "machine": Phase(machine, 60),
    "doctor": Phase(doctor, 120),
    "kernels": Phase(kernels, 420),  # where no kernel is compiled yet, that takes minutes
    "speed": Phase(speed, 300),
    "studies": Phase(studies, 600),
    "leak": Phase(leak, 120),
    "where": Phase(where, 120),
    "generation": Phase(generation, 120),
    "chunks": Phase(chunks, 300),
    "reference": Phase(reference, 300),
    "compiled": Phase(compiled, 300),
}
WORDS = ("PASS", "FAIL", "NOTE")


def main() -> int:
    """Run the phases named on the command line, or all; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=__doc__.split("\n\n", maxsplit=1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"of {', '.join(PHASES)}; default all")
    parser.add_argument("--tiny", action="store_true", help="small models, also on a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the output")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.phases) - set(PHASES):
        parser.error(f"no phase {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    if options.here:
        for name in options.phases:
            PHASES[name].run(TINY if options.tiny else FULL)
        return 0
    reaper.start_reaper()
    options.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    if DEVICE == "cpu" and not options.tiny:
        options.phases = ["machine"]  # it says what is missing
    for name in options.phases or [name for name in PHASES if name != "machine"]:
        lines += run_apart(name, options.out, tiny=options.tiny)
        (options.out / "check.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return int(any(line.startswith("FAIL") for line in lines))


def run_apart(name: str, out: Path, *, tiny: bool) -> list[str]:
    """Run a phase in a process of its own; print and return its lines."""
    log, begun = out / f"{name}.log", time.monotonic()
    command = [sys.executable, "-m", "tests.gpu", name, "--here", *(["--tiny"] if tiny else [])]
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **os.environ}
    with log.open("w", encoding="utf-8") as file:
        try:
            subprocess.run(
                command,
                env=environment,
                stdout=file,
                stderr=file,
                timeout=PHASES[name].most_seconds,
                check=True,
            )
            problem = None
        except subprocess.SubprocessError as error:
            problem = error
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith(WORDS)]
    if problem is not None:
        lines.append(f"FAIL {name}: {problem}; see {log}")
    lines.append(f"NOTE {name}: {time.monotonic() - begun:.1f} s")
    print("\n".join(lines), flush=True)
    return lines


if __name__ == "__main__":
    sys.exit(main())
