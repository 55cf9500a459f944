"""Dense peaks of NVIDIA's GPUs by name, in TFLOP/s: what a plan's hours and a journal's MFU are measured against.

bf16 is the peak of the tensor cores with sums in fp32 and without sparsity, fp32 that of the plain cores; TF32 runs at
half the rate of bf16. Figures that data sheets give with sparsity alone are halved.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense peaks of a GPU, TFLOP/s."""

    bf16: float
    fp32: float

    @property
    def tf32(self) -> float:
        """Half of bf16's on tensor cores; without those that take both, fp32's."""
        return max(self.bf16 / 2, self.fp32)


def _geforce(fp32: float) -> Peak:
    return Peak(2 * fp32, fp32)  # sums in fp32 at half the rate of a workstation's card of the same chip


def _workstation(fp32: float) -> Peak:
    return Peak(4 * fp32, fp32)


def _without_bf16(fp32: float) -> Peak:
    return Peak(fp32, fp32)  # no tensor core takes bf16: it is computed in fp32


A100, H100, H100_PCIE, H100_NVL = Peak(312.0, 19.5), Peak(989.4, 66.9), Peak(756.0, 51.2), Peak(835.5, 60.0)
PEAKS = {
    # Blackwell: data sheets of HGX B200 and B300 and of GB200 and GB300 NVL72, a GPU's share.
    "B200": Peak(2250.0, 75.0),
    "B300": Peak(2250.0, 75.0),
    "GB200": Peak(2500.0, 80.0),
    "GB300": Peak(2500.0, 80.0),
    # Hopper: H100 architecture white paper; data sheets of H100 NVL, H200 and H20.
    "H100": H100,
    "H100 PCIe": H100_PCIE,
    "H100 NVL": H100_NVL,
    "H800": H100,
    "H800 PCIe": H100_PCIE,
    "H200": H100,
    "H200 NVL": H100_NVL,
    "H20": Peak(148.0, 44.0),
    # Ampere in servers: A100 architecture white paper; data sheets of A30, A40, A10, and of AWS for A10G.
    "A100": A100,
    "A100 PCIe": A100,
    "A800": A100,
    "A800 PCIe": A100,
    "A30": Peak(165.0, 10.3),
    "A40": Peak(149.7, 37.4),
    "A10": Peak(125.0, 31.2),
    "A10G": Peak(70.0, 35.0),
    # Ada in servers: data sheets of L4, L40 and L40S.
    "L4": Peak(121.0, 30.3),
    "L40": Peak(181.0, 90.5),
    "L40S": Peak(362.0, 91.6),
    # Volta and Turing in servers: data sheets of V100 and T4.
    "V100": _without_bf16(15.7),
    "V100 PCIe": _without_bf16(14.0),
    "V100S PCIe": _without_bf16(16.4),
    "T4": _without_bf16(8.1),
    # Workstations: cores and clocks of the data sheets at the rates of the white papers of GA102, AD102 and GB202.
    "RTX A2000": _workstation(8.0),
    "RTX A4000": _workstation(19.2),
    "RTX A4500": _workstation(23.7),
    "RTX A5000": _workstation(27.8),
    "RTX A6000": _workstation(38.7),
    "RTX 4000 Ada": _workstation(26.7),
    "RTX 5000 Ada": _workstation(65.3),
    "RTX 6000 Ada": _workstation(91.1),
    "RTX PRO 6000": _workstation(125.0),
    "RTX PRO 6000 Max Q": _workstation(110.0),
    # GeForce: the same white papers.
    "RTX 3060": _geforce(12.7),
    "RTX 3060 Ti": _geforce(16.2),
    "RTX 3070": _geforce(20.3),
    "RTX 3070 Ti": _geforce(21.7),
    "RTX 3080": _geforce(29.8),
    "RTX 3080 Ti": _geforce(34.1),
    "RTX 3090": _geforce(35.6),
    "RTX 3090 Ti": _geforce(40.0),
    "RTX 4060": _geforce(15.1),
    "RTX 4060 Ti": _geforce(22.1),
    "RTX 4070": _geforce(29.1),
    "RTX 4070 Super": _geforce(35.5),
    "RTX 4070 Ti": _geforce(40.1),
    "RTX 4070 Ti Super": _geforce(44.1),
    "RTX 4080": _geforce(48.7),
    "RTX 4080 Super": _geforce(52.2),
    "RTX 4090": _geforce(82.6),
    "RTX 5070": _geforce(30.9),
    "RTX 5070 Ti": _geforce(43.9),
    "RTX 5080": _geforce(56.3),
    "RTX 5090": _geforce(104.8),
}
VARIANTS = frozenset(
    {"ti", "super", "d", "laptop", "mobile", "max", "ada", "pro", "nvl", "pcie", "rtx", "sff"}
)
"""Words of a name that tell another GPU: one that has them is none of a table's without."""
SLICE = re.compile(r"(?:(?<![a-z0-9])(\d)c\.)?(?<![a-z0-9])(\d)g\.\d+gb", re.IGNORECASE)
"""Profile of a MIG slice, such as 3g.40gb or 1c.3g.40gb: compute slices of the instance, or of the part of one."""
FOUR_SLICES = frozenset({"A30", "RTX PRO 6000"})
"""GPUs that MIG cuts into four compute slices; the others into seven (NVIDIA, MIG user guide, supported profiles)."""


def peak_flops(name: str | None, precision: str) -> float | None:
    """Return the dense peak of a GPU in FLOP/s, of a MIG slice its share; None for a name that no table has.

    name: by the driver or a profile, such as "NVIDIA H100 80GB HBM3" or h100.
    """
    found = _known(name or "")
    if found is None or precision not in {"bf16", "tf32", "fp32"}:
        return None
    whole: float = getattr(PEAKS[found], precision)
    part = SLICE.search(name or "")
    share = int(part[1] or part[2]) / (4 if found in FOUR_SLICES else 7) if part else 1.0
    return 1e12 * whole * share


def is_slice(name: str | None) -> bool:
    """Return True if a name is that of a MIG slice."""
    return name is not None and (SLICE.search(name) is not None or re.search(r"\bMIG\b", name) is not None)


def _known(name: str) -> str | None:
    """Return the key of a GPU: the longest of which the name has every word, and no variant besides."""
    words = _words(SLICE.sub("", name))
    keys = [key for key in PEAKS if (own := _words(key)) <= words and not (words - own) & VARIANTS]
    return max(keys, key=lambda key: len(_words(key)), default=None)


def _words(name: str) -> frozenset[str]:
    # SLURM's names join them: rtx4090, nvidia_a100_3g.20gb.
    return frozenset(re.findall(r"rtx(?=a?\d)|[a-z0-9]+", name.lower()))
