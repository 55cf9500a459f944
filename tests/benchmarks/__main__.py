"""Measure the claims of speed: `python -m tests.benchmarks [NAME]... [--quick]`.

Each comparison runs both sides in turn and prints a ratio. No benchmark fails for being slow, which depends on the
machine; it fails if the two sides give different answers.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version

# Keep transformers from looking for compiled kernels on its hub, and torch's profiler from printing.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "KINETO_LOG_LEVEL": "99"}

import torch
from threadpoolctl import threadpool_limits

from tests import reaper
from tests.benchmarks import (
    bootstrap,
    corpus,
    decoding,
    fit,
    generation,
    gpu,
    graphs,
    overhead,
    packing,
    plan,
    points,
    scan,
    slurm,
    starts,
    trunk,
)

BENCHMARKS = {
    "scan": scan.run,
    "gpu": gpu.run,
    "graphs": graphs.run,
    "fit": fit.run,
    "bootstrap": bootstrap.run,
    "trunk": trunk.run,
    "overhead": overhead.run,
    "points": points.run,
    "generation": generation.run,
    "plan": plan.run,
    "decoding": decoding.run,
    "packing": packing.run,
    "starts": starts.run,
    "slurm": slurm.run,
    "corpus": corpus.run,
}
THREADS = 1  # as a training process has by default
LINE = "{:<60} {:>12} {:>12}  {}"


def main() -> None:
    """Run the benchmarks named on the command line, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and smaller cases")
    options = parser.parse_args()
    reaper.start_reaper()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "transformers"))
    print(f"{THREADS} thread of {os.cpu_count()} cores, {platform.machine()}; {libraries}")
    print("ratio: baseline over ours, of medians; in brackets the lowest and highest of a round\n")
    print(LINE.format("what", "ours", "baseline", "ratio"))
    torch.set_num_threads(THREADS)
    with threadpool_limits(THREADS):
        for name in options.names or BENCHMARKS:
            for row in BENCHMARKS[name](quick=options.quick):
                print(LINE.format(row.what, row.ours, row.baseline, row.ratio), flush=True)


if __name__ == "__main__":
    main()
