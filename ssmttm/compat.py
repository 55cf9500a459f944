"""Workarounds for other packages.

torchaudio's wheel is built against CUDA. Beside a CPU build of torch its import raises OSError, and transformers, which
only probes for it, then fails to import its models. The encodec package imports it for resampling.

DeepSpeed imports the whole of an installed MLflow for its own tuner, which this project does not use.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from types import ModuleType


def tame_torchaudio() -> None:
    """Hide torchaudio from later imports if it cannot load; call it before importing transformers."""
    if "torchaudio" in sys.modules or find_spec("torchaudio") is None:
        return
    try:
        import torchaudio  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except (OSError, ImportError):
        for name in [name for name in sys.modules if name.startswith("torchaudio.")]:
            del sys.modules[name]
        # None makes `import torchaudio` raise ImportError, which a probe handles, instead of OSError.
        sys.modules["torchaudio"] = None  # type: ignore[assignment]


@contextmanager
def module_at_import(name: str, module: ModuleType | None) -> Iterator[None]:
    """Make `import name` return a module inside the block, or raise ImportError for None."""
    before = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = module  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


def torchaudio_at_import() -> AbstractContextManager[None]:
    """Make `import torchaudio` return an empty module if it cannot load, for packages that use it later or never."""
    tame_torchaudio()
    if sys.modules.get("torchaudio") or ("torchaudio" not in sys.modules and find_spec("torchaudio")):
        return nullcontext()
    return module_at_import("torchaudio", ModuleType("torchaudio"))


def without_mlflow() -> AbstractContextManager[None]:
    """Make `import mlflow` raise ImportError unless it has been imported already.

    For the first import of deepspeed, in a process where no other thread imports MLflow: that saves a third of the CPU
    time of a worker's start.
    """
    return nullcontext() if "mlflow" in sys.modules else module_at_import("mlflow", None)


def pickle_zero_stages_by_value() -> None:
    """Have DeepSpeed's checkpoints hold a ZeRO stage as its number on every Python.

    Python 3.11.0 to 3.11.3 pickle a member of an enumeration as a call of getattr, which no loader may allow.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda self, _protocol: (ZeroStageEnum, (self.value,))


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next training step; return True if it accepts the settings.

    By default it returns blocks of the size of a batch's logits to the kernel and faults their pages in again at every
    step: up to a quarter of the time of a small model's step on a CPU.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # 32 MiB is the largest threshold glibc accepts; larger blocks are mapped in any case.
    return bool(mallopt(mmap_threshold, 32 * 2**20)) and bool(mallopt(trim_threshold, 2**31 - 1))


def return_freed_memory() -> None:
    """Return to the kernel what glibc has kept: after a training whose tensors the next one may not have."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
