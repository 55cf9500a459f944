"""Text of counts, durations, sizes and ranges, and of commands to type."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path


def hint(*words: str, root: Path | None = None) -> str:
    """Return a command that the user can type as it is printed; `root` is that of the study it names."""
    usual = Path(os.environ.get("SSMSCALE_ROOT") or "runs")
    place = ("--root", str(root)) if root is not None and root != usual else ()
    return f"`{shlex.join(['ssmscale', *words, *place])}`"


def duration(hours: float) -> str:
    """Return hours as a time with its unit: 0.34 s, 12 min, 5.1 h."""
    seconds = hours * 3600
    for limit, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds:.2g} s"


def short(number: float) -> str:
    """Return a count with three digits and a unit: 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def spread(hours: Estimate) -> str:
    """Return a time with its likely range: 12 min (9.1 min to 16 min)."""
    return f"{duration(hours.expected)} ({duration(hours.low)} to {duration(hours.high)})"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 run, 2 runs; 1 series, 2 series."""
    return f"{number} {noun}" if number == 1 or noun.endswith("s") else f"{number} {noun}s"


GIB = 2.0**30


@dataclass(frozen=True)
class Estimate:
    """An expected value and its likely range, by default nothing."""

    low: float = 0.0
    expected: float = 0.0
    high: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.low * factor, self.expected * factor, self.high * factor)
