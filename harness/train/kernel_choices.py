"""The configurations of mamba-ssm's kernels, chosen once for a type of GPU and kept under ROOT.

Triton has up to eleven configurations of each kernel (block sizes, warps, stages). At its first call it compiles and
times them all: minutes in the first process, 15 to 20 seconds in each later one, and two processes may choose
differently and then add in another order. Triton's own record of these times leaves out kernels that clear a result
before they add to it, most of mamba-ssm's backward pass. So the first process to time a kernel notes its choice in

    ROOT/kernels/GPU/VERSIONS/KERNEL-KEY.json

and all other ranks and jobs on such a GPU take it from there, and compile that configuration alone. The first note
counts for all and is never replaced, unless it is damaged. It can only name one of the package's own configurations:
written by another user it may cost speed, and executes nothing. Compiled code is therefore not kept here but in
Triton's cache, in the user's home.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.common.disk import DiskFull, make_folder, write_atomically, write_new
from harness.record.provenance import installed_version
from harness.record.root import Root
from harness.study.run import Frozen
from harness.train.ranks import device_name
from ssmttm.errors import InputError
from ssmttm.files import read_document

log = logging.getLogger("ssmscale.worker")

PACKAGES = ("torch", "triton", "mamba-ssm")
"""Packages of which another version may have other configurations, or compile them otherwise."""


class Choice(Frozen):
    """A file under ROOT/kernels."""

    kernel: str
    key: str
    """Sizes and types for which Triton times a kernel anew."""
    config: str


class KernelChoices:
    """Origins of the configurations of this process's kernels, and the time spent on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = 0
        """Choices taken from the folder."""
        self.timed = 0
        """Choices made here."""
        self.compiled = 0
        """Configurations that were not in Triton's cache."""
        self.seconds = 0.0
        """Time of compiling and timing."""
        self._is_timing = False
        self._reported: dict[str, float] = {}

    def take_over(self, tuner: Any) -> None:
        """Let one of Triton's autotuners choose by the folder."""
        tuner.cache_results = True
        tuner.check_disk_cache = partial(self._choose, tuner)

    def report(self) -> dict[str, float]:
        """Return the counts and seconds as fields of a journal; empty if they are as they were last time."""
        counts = {name: float(getattr(self, name)) for name in ("found", "timed", "compiled")}
        now = {f"kernels_{name}": value for name, value in counts.items()}
        now["kernels_seconds"] = round(self.seconds, 1)
        if now == self._reported or not any(now.values()):
            return {}
        self._reported = now
        log.info(
            "kernels: %d configurations from %s, %d timed here; %d compiled; %.0f s",
            *(self.found, self.folder, self.timed, self.compiled, self.seconds),
        )
        return now

    def count_compiled(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        """Count a kernel that Triton has compiled or found in its cache; called by Triton."""
        if not cache_hit:
            self.compiled += 1
        if not self._is_timing:
            self.seconds += times.total / 1e6

    def _choose(
        self, tuner: Any, key: tuple[Any, ...], configs: Sequence[Any], time_all: Callable[[], None]
    ) -> bool:
        """Put one of the configurations into the tuner's cache; return True if it was not timed here."""
        kernel, words = tuner.base_fn.__name__, str(key)
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        path = self.folder / f"{kernel}-{digest}.json"
        config = _read(path, kernel, words, configs)
        is_found = config is not None
        if config is None:
            with self._timing():
                time_all()
            config = tuner.cache[key]
            if math.isfinite(min(tuner.configs_timings[config])):  # else none of them could run
                config = _note(path, kernel, words, config, configs)
        self.found += is_found
        self.timed += not is_found
        tuner.cache[key] = config
        return is_found

    @contextlib.contextmanager
    def _timing(self) -> Iterator[None]:
        begun, self._is_timing = time.monotonic(), True
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun
            self._is_timing = False


def keep_choices(root: Root, device: str) -> KernelChoices | None:
    """Keep the choices of this process's kernels under ROOT from now on; None if no kernels of Triton run here."""
    from ssmttm.model.kernels import chosen

    gpu = device_name(device)
    if gpu is None or chosen().scan is None:
        return None
    import triton

    versions = " ".join(f"{name} {installed_version(name)}" for name in PACKAGES)
    choices = KernelChoices(root.path / "kernels" / _as_name(gpu) / _as_name(versions))
    for tuner in tuners():
        choices.take_over(tuner)
    triton.knobs.compilation.listener = choices.count_compiled
    return choices


def tuners() -> list[Any]:
    """Return the autotuners of mamba-ssm's kernels that this process has loaded."""
    from triton.runtime.autotuner import Autotuner

    modules = [module for name, module in sys.modules.items() if name.startswith("mamba_ssm.ops.triton.")]
    return [found for module in modules for found in vars(module).values() if isinstance(found, Autotuner)]


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


def _read(path: Path, kernel: str, key: str, configs: Sequence[Any]) -> Any | None:
    """Return the configuration that a file names; None if there is no such file, or it names none of these."""
    try:
        choice = Choice.model_validate_json(read_document(path))
    except (OSError, ValidationError):
        return None
    named = [config for config in configs if str(config) == choice.config]
    return named[0] if named and (choice.kernel, choice.key) == (kernel, key) else None


def _note(path: Path, kernel: str, key: str, config: Any, configs: Sequence[Any]) -> Any:
    """Write a choice into a file, and return it, or the choice of another process that was first.

    Without leave or room to write, the choice is this process's own.
    """
    text = Choice(kernel=kernel, key=key, config=str(config)).model_dump_json(indent=1) + "\n"
    with contextlib.suppress(OSError, DiskFull, InputError):
        make_folder(path.parent)
        if not write_new(path, text):
            if (other := _read(path, kernel, key, configs)) is not None:
                return other
            write_atomically(path, text)  # in place of a damaged file
    return config
