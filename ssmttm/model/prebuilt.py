"""A prebuilt causal-conv1d of Hugging Face's hub, for machines without nvcc.

A lock file fixes its revision, and it is loaded from the local cache alone: training never waits for a network and
never runs code that has changed since it was locked. `kernels lock` writes the file and `kernels download` fills the
cache; both belong to the package `kernels`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ssmttm.compat import module_at_import

REPOSITORY = "kernels-community/causal-conv1d"


def load_prebuilt(lock: Path) -> tuple[ModuleType, str]:
    """Return the module built for this torch and CUDA, and its name with the revision; raises if the cache has none."""
    from kernels import load_kernel
    from kernels.locking import get_locked_kernel_revision

    locked, kernel = get_locked_kernel_revision(REPOSITORY, lock)
    return load_kernel(REPOSITORY, lockfile=lock), f"{REPOSITORY} at {locked[kernel].commit[:12]}"


@contextmanager
def at_import(module: ModuleType | None) -> Iterator[None]:
    """Have mamba-ssm, which imports two modules of causal-conv1d, get those of a prebuilt one inside the block."""
    if module is None or module.__name__ == "causal_conv1d":  # missing or installed
        yield
        return
    functions = sys.modules[f"{module.__name__}.cpp_functions"]
    with (
        module_at_import("causal_conv1d", module),
        module_at_import("causal_conv1d.cpp_functions", functions),
    ):
        yield
