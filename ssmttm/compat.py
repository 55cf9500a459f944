"""What has to be done about other people's software before it is used, in one place.

torchaudio's wheel is built against CUDA. Beside a CPU build of torch its import raises OSError, and
transformers, which only probes for it, then fails to import its models. The encodec package imports it for resampling.

DeepSpeed imports the whole of MLflow, if it is there, for a tuner of its own that nothing here uses.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def tame_torchaudio() -> None:
    """Hide torchaudio from later imports if it cannot load; to be called before importing transformers."""
    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is None:
        return
    try:
        import torchaudio  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except (OSError, ImportError):
        for name in [name for name in sys.modules if name.startswith("torchaudio.")]:
            del sys.modules[name]
        # None makes `import torchaudio` an ImportError, which a probe handles, where OSError would escape it.
        sys.modules["torchaudio"] = None  # type: ignore[assignment]


@contextmanager
def torchaudio_at_import() -> Iterator[None]:
    """Have `import torchaudio` give an empty module where it cannot load, for packages that use it later or never."""
    tame_torchaudio()
    hidden = "torchaudio" in sys.modules and sys.modules["torchaudio"] is None
    absent = "torchaudio" not in sys.modules and importlib.util.find_spec("torchaudio") is None
    if not hidden and not absent:
        yield
        return
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        yield
    finally:
        if hidden:
            sys.modules["torchaudio"] = None  # type: ignore[assignment]
        else:
            del sys.modules["torchaudio"]


@contextmanager
def without_mlflow() -> Iterator[None]:
    """Have `import mlflow` raise ImportError where it has not been imported yet, as if it were not installed.

    For the first import of deepspeed, in a process where no other thread imports MLflow: a third of the CPU time that a
    worker took to start.
    """
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def keep_freed_memory() -> bool:
    """Make glibc keep the memory it frees for the next training step; return whether it could be told so.

    By default it hands blocks the size of a batch's logits back to the kernel and faults their pages in
    again at every step: up to a quarter of the time of a small model's step on a CPU.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # 32 MiB is the largest threshold glibc accepts; larger blocks are mapped in any case.
    return bool(mallopt(mmap_threshold, 32 * 2**20)) and bool(mallopt(trim_threshold, 2**31 - 1))
