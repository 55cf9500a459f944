"""GPUs that this process may use, as the driver tells them through NVML, without starting CUDA.

A plan reads them in milliseconds and without torch. A CUDA context would take memory of each GPU, and no process forked
later could use CUDA. Drivers answer only a part: WSL2 knows no MIG, a container is refused other users' devices, and a
GPU that shares the host's memory has none to tell. What a driver does not answer stays unknown.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.common.format import GIB, counted

VISIBLE = "CUDA_VISIBLE_DEVICES"
PROC = Path("/proc/driver/nvidia/gpus")
"""A folder a GPU, where the kernel module of the driver is loaded; WSL2 has none."""


@dataclass(frozen=True)
class Gpu:
    """A device of CUDA: a GPU, or a MIG slice of one."""

    name: str
    """Name by the driver, as torch gives it too."""
    handle: str
    """Name in CUDA_VISIBLE_DEVICES: its UUID, or its index where the driver tells none."""
    memory: int | None = None
    """Bytes that programs may take, the driver's own left out; None if the driver does not tell."""

    def __str__(self) -> str:
        return self.name + (f" ({self.memory / GIB:.3g} GiB)" if self.memory else "")


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this machine or container."""

    devices: tuple[Gpu, ...] = ()
    """Devices that this process may use, in the order of CUDA_VISIBLE_DEVICES."""
    present: int = 0
    """Number of devices, hidden ones included."""
    driver: str | None = None
    """Version of the driver, such as 580.65.06."""
    cuda: tuple[int, int] | None = None
    """Newest version of CUDA that the driver takes."""
    problem: str | None = None
    """Reason why NVML tells nothing, or no device."""

    def __str__(self) -> str:
        """Describe devices and driver: 8 x NVIDIA H100 80GB HBM3 (79.6 GiB), driver 580.65.06 for CUDA up to 13.0."""
        kinds = Counter(map(str, self.devices))
        found = [f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()] or ["no GPU"]
        if self.present > len(self.devices):
            found.append(f"{self.present - len(self.devices)} more hidden by {VISIBLE}")
        return ", ".join([*found, *([self.driver_words] if self.driver else [])])

    @property
    def driver_words(self) -> str:
        """Driver and newest CUDA it takes."""
        up_to = f" for CUDA up to {version_words(self.cuda)}" if self.cuda else ""
        return f"driver {self.driver or 'unknown'}{up_to}"


def version_words(version: tuple[int, int]) -> str:
    """Return a version as NVIDIA writes it: 13.0."""
    return ".".join(map(str, version))


def read_gpus() -> Gpus:
    """Read the GPUs and the driver; never raises for a driver that is missing or answers in part."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return _from_proc()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Gpus(problem=_refusal(error))
    try:
        return _Nvml(pynvml).read()
    finally:
        pynvml.nvmlShutdown()


def why_no_gpu(gpus: Gpus, torch_version: str, torch_cuda: str | None, wanted: int = 1) -> str | None:
    """Return why torch finds fewer than `wanted` GPUs here and what to do about it; None if NVML shows no reason.

    torch_cuda: version of CUDA that torch is built for, `torch.version.cuda`; None for a build without it.
    """
    seen, visible = len(gpus.devices), os.environ.get(VISIBLE)
    if torch_cuda is None:
        up_to = f" up to {version_words(gpus.cuda)}, which the driver takes" if gpus.cuda else ""
        return f"torch {torch_version} is a build for the CPU: install one for CUDA{up_to}"
    if gpus.problem and not seen:
        return gpus.problem
    if visible is not None and not seen:
        return f"{VISIBLE}={visible!r} hides {counted(gpus.present, 'GPU')}: unset it, or name a GPU in it"
    if gpus.cuda and int(torch_cuda.split(".")[0]) > gpus.cuda[0]:
        return (
            f"the driver is too old for this torch: {gpus.driver_words}, and torch {torch_version} is built for CUDA "
            f"{torch_cuda}; update the driver, or install a torch for CUDA {gpus.cuda[0]}"
        )
    if seen < wanted:
        shows = f"{VISIBLE}={visible!r} shows" if visible is not None else "the driver shows"
        return f"{wanted} GPUs are needed here, and {shows} {seen} of {gpus.present}"
    return None


def _refusal(error: Exception) -> str:
    said = f"no NVIDIA driver answers (NVML: {error})"
    if "mismatch" in str(error).lower():  # after an update of the driver, until its module is loaded again
        return (
            f"{said}: Driver/library version mismatch; restart the machine, or load the driver's module again"
        )
    if PROC.is_dir():
        return f"{said}, though its module is loaded: start the container with the driver (--gpus all, --nv)"
    return f"{said}: install it if this machine has an NVIDIA GPU"


def _from_proc() -> Gpus:
    """Count the GPUs where the Python package of NVML is missing; their memory stays unknown."""
    problem = "NVML cannot be read: pip install nvidia-ml-py"
    facts = sorted(PROC.glob("*/information")) if PROC.is_dir() else []
    texts = [path.read_text("utf-8", "replace") for path in facts]
    models = [re.search(r"^Model:\s*(.*?)\s*$", text, re.MULTILINE) for text in texts]
    gpus = [Gpu(found[1] if found else "NVIDIA GPU", str(index)) for index, found in enumerate(models)]
    return Gpus(tuple(_visible([_Board(gpu, (gpu,)) for gpu in gpus])), len(gpus), problem=problem)


@dataclass(frozen=True)
class _Board:
    """A GPU and its devices: itself, or its MIG slices."""

    gpu: Gpu
    devices: tuple[Gpu, ...]


class _Nvml:
    """One reading through NVML, which is initialised."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def read(self) -> Gpus:
        boards = list(self._boards())
        every = [device for board in boards for device in board.devices]
        version = self._ask("nvmlSystemGetCudaDriverVersion_v2") or self._ask(
            "nvmlSystemGetCudaDriverVersion"
        )
        problem = None
        if boards and not every:
            problem = "MIG is on and no slice is made: make some with `nvidia-smi mig -cgi ... -C`"
        elif not boards:
            problem = "the driver shows no GPU here: ask for some where this job or container is started"
        return Gpus(
            devices=tuple(_visible(boards)),
            present=len(every),
            driver=_text(self._ask("nvmlSystemGetDriverVersion")),
            cuda=(version // 1000, version % 1000 // 10) if version else None,
            problem=problem,
        )

    def _ask(self, name: str, *arguments: object) -> Any:
        """Return an answer of NVML; None if the driver, or an older package, does not support the question."""
        try:
            return getattr(self._nvml, name)(*arguments)
        except (self._nvml.NVMLError, AttributeError, TypeError):
            return None

    def _boards(self) -> Iterator[_Board]:
        for index in range(self._ask("nvmlDeviceGetCount") or 0):
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            if handle is None:  # another user's, or lost: CUDA does not count it either
                continue
            gpu = self._gpu(handle, str(index))
            mode = self._ask("nvmlDeviceGetMigMode", handle)
            is_cut = bool(mode) and mode[0] == getattr(self._nvml, "NVML_DEVICE_MIG_ENABLE", 1)
            yield _Board(gpu, tuple(self._slices(handle, gpu.name)) if is_cut else (gpu,))

    def _slices(self, handle: object, name: str) -> Iterator[Gpu]:
        for index in range(self._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            part = self._ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if part is None:  # none is made there
                continue
            found = self._gpu(part, "")
            if "MIG" not in found.name:
                size = self._ask("nvmlDeviceGetAttributes_v2", part) or self._ask(
                    "nvmlDeviceGetAttributes", part
                )
                profile = f" {size.gpuInstanceSliceCount}g.{size.memorySizeMB / 1024:.0f}gb" if size else ""
                found = replace(found, name=f"{name} MIG{profile}")
            if found.handle:
                yield found

    def _gpu(self, handle: object, index: str) -> Gpu:
        # The total includes what the driver keeps for itself, which only the second version tells apart.
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle, getattr(self._nvml, "nvmlMemory_v2", None))
        memory = memory or self._ask("nvmlDeviceGetMemoryInfo", handle)
        total = int(memory.total - getattr(memory, "reserved", 0)) if memory else None
        name = _text(self._ask("nvmlDeviceGetName", handle)) or "NVIDIA GPU"
        return Gpu(name, _text(self._ask("nvmlDeviceGetUUID", handle)) or index, total)


def _text(value: str | bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _visible(boards: list[_Board]) -> list[Gpu]:
    """Return the devices that CUDA_VISIBLE_DEVICES leaves, as CUDA reads it (CUDA programming guide, section 5.2).

    A word that names no device ends the list, and one that comes twice empties it.
    """
    if VISIBLE not in os.environ:
        return [device for board in boards for device in board.devices]
    chosen: list[Gpu] = []
    for word in os.environ[VISIBLE].split(","):
        found = _named(word.strip(), boards, in_order=os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID")
        if found is None:
            break
        if found.handle in {one.handle for one in chosen}:
            return []
        chosen.append(found)
    return chosen


def _named(word: str, boards: list[_Board], *, in_order: bool) -> Gpu | None:
    """Return the device that a word of CUDA_VISIBLE_DEVICES names: an index, or the beginning of a UUID."""
    if number := re.match(r"\+?\d+", word):
        if int(number[0]) >= len(boards):
            return None
        board = boards[int(number[0])]
        if not in_order and len({one.gpu.name for one in boards}) > 1:
            # CUDA counts the fastest first and NVML by the bus, so a number may mean any of unlike GPUs: the weakest.
            weakest = min(boards, key=lambda one: one.gpu.memory or 0)
            return replace(weakest.gpu, handle=number[0])
        return next(iter(board.devices), None)
    if not re.match(r"GPU-|MIG-", word):
        return None
    parts = [device for board in boards for device in board.devices if device.handle.startswith(word)]
    whole = [board.devices[0] for board in boards if board.devices and board.gpu.handle.startswith(word)]
    found = parts or whole  # of a GPU that is cut CUDA takes the first slice
    return found[0] if len(found) == 1 else None
