"""Both sides of a comparison in one process and by turns, so that whatever else the machine does falls on both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table, as it is printed."""

    what: str
    ours: str
    baseline: str
    ratio: str


def by_turns(rounds: int, *sides: Work) -> Seconds:
    """Seconds of each side in each round (sides, rounds), after one call of each that is not counted."""
    for side in sides:
        side()
    return np.array([[clocked(side) for side in sides] for _ in range(rounds)]).T


def clocked(work: Work) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def times(what: str, ours: Seconds, baseline: Seconds) -> Row:
    """Medians over rounds and their ratio; in brackets the lowest and the highest ratio of a round."""
    ratio = np.median(baseline) / np.median(ours)
    each = baseline / ours
    spread = f" ({as_ratio(each.min())} to {as_ratio(each.max())})" if len(each) > 1 else ""
    return Row(
        what,
        as_time(float(np.median(ours))),
        as_time(float(np.median(baseline))),
        as_ratio(ratio) + spread,
    )


def as_time(seconds: float) -> str:
    """Seconds or milliseconds, three digits."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def as_ratio(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
