"""A module in place of pynvml, which answers as the drivers of machines that the tests do not have."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

GIB = 2**30
MIB = 2**20
SLICES = 7
"""Most slices of a GPU."""


@dataclass
class Card:
    """A GPU, or a MIG slice, that NVML tells of."""

    name: str
    mib: int | None
    """MiB in all; None for one that the driver has no answer for."""
    reserved_mib: int = 0
    slices: tuple[Card, ...] | None = None
    """Slices of a GPU in MIG mode; None if it is in none."""
    is_hidden: bool = False
    """True if the container may not use it."""
    uuid: str = ""


H100 = Card("NVIDIA H100 80GB HBM3", 81559, 59)
RTX_4090 = Card("NVIDIA GeForce RTX 4090", 24564, 500)
SLICE_OF_A100 = Card("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40448)


class NVMLError(Exception):
    """The base of NVML's errors, as pynvml names it."""


class NotSupported(NVMLError):
    """A question that this driver does not answer."""

    def __str__(self) -> str:
        return "Not Supported"


def install(
    monkeypatch: pytest.MonkeyPatch,
    *cards: Card,
    driver: str = "580.65.06",
    cuda: int = 13000,
    unsupported: tuple[str, ...] = (),
    failure: str | None = None,
) -> None:
    """Have `import pynvml` give a module that tells of these cards; `failure` is what nvmlInit raises."""
    module: Any = ModuleType("pynvml")
    for index, card in enumerate(cards):
        card.uuid = card.uuid or f"GPU-{index:08x}-0000"
        for number, part in enumerate(card.slices or ()):
            part.uuid = f"MIG-{index:08x}-{number:04x}"

    def start() -> None:
        if failure is not None:
            raise NVMLError(failure)

    def of_index(index: int) -> Card:
        if cards[index].is_hidden:
            raise NVMLError("Insufficient Permissions")
        return cards[index]

    def mode(card: Card) -> list[int]:
        if card.name.startswith("NVIDIA GeForce"):
            raise NotSupported
        return [int(card.slices is not None)] * 2

    def slice_of(card: Card, index: int) -> Card:
        if index >= len(card.slices or ()):
            raise NVMLError("Not Found")
        return (card.slices or ())[index]

    def memory(card: Card, version: int | None = None) -> SimpleNamespace:
        if card.mib is None:
            raise NotSupported
        reserved = {"reserved": card.reserved_mib * MIB} if version else {}
        return SimpleNamespace(total=card.mib * MIB, free=0, used=0, **reserved)

    answers = {
        "nvmlInit": start,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: driver,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: cuda,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": of_index,
        "nvmlDeviceGetName": lambda card: card.name,
        "nvmlDeviceGetUUID": lambda card: card.uuid,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetMigMode": mode,
        "nvmlDeviceGetMaxMigDeviceCount": lambda card: SLICES,
        "nvmlDeviceGetMigDeviceHandleByIndex": slice_of,
    }

    def refuse(*_: object) -> None:
        raise NotSupported

    vars(module).update(answers, NVMLError=NVMLError, NVML_DEVICE_MIG_ENABLE=1, nvmlMemory_v2=0x02000028)
    vars(module).update(dict.fromkeys(unsupported, refuse))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def copies(card: Card, count: int) -> list[Card]:
    """Return so many cards of a kind, each with a UUID of its own."""
    return [Card(card.name, card.mib, card.reserved_mib, card.slices) for _ in range(count)]
