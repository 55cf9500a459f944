"""What has to be done about other people's packages before they are imported, in one place.

torchaudio's wheel is built against CUDA. Beside a CPU build of torch its import raises OSError, and
transformers, which only probes for it, then fails to import its models.
"""

import importlib.util
import sys


def tame_torchaudio() -> None:
    """Hide torchaudio from later imports if it is installed but cannot load; call before importing
    transformers.
    """
    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is None:
        return
    try:
        import torchaudio  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except (OSError, ImportError):
        for name in [name for name in sys.modules if name.startswith("torchaudio.")]:
            del sys.modules[name]
        # None makes `import torchaudio` an ImportError, which a probe handles, where OSError would escape it.
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
