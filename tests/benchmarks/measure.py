"""Measure both sides of a comparison in one process and by turns, so that other load falls on both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the printed table."""

    what: str
    ours: str
    baseline: str
    ratio: str


def by_turns(rounds: int, *sides: Work) -> Seconds:
    """Return the seconds of each side in each round (sides, rounds), after one call of each that does not count."""
    for side in sides:
        side()
    return np.array([[clocked(side) for side in sides] for _ in range(rounds)]).T


def clocked(work: Work) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def times(what: str, ours: Seconds, baseline: Seconds) -> Row:
    """Return the row of two sides: medians over rounds and their ratio, with the range of the rounds' ratios."""
    ratio = np.median(baseline) / np.median(ours)
    each = baseline / ours
    spread = f" ({as_ratio(each.min())} to {as_ratio(each.max())})" if len(each) > 1 else ""
    ours_taken, baseline_taken = (as_time(float(np.median(side))) for side in (ours, baseline))
    return Row(what, ours_taken, baseline_taken, as_ratio(ratio) + spread)


def as_time(seconds: float) -> str:
    """Format a time in seconds or milliseconds, with three digits."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def as_ratio(value: float) -> str:
    """Format a ratio with three digits, never as a power of ten."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


@contextmanager
def spent_in(
    *watched: tuple[object, str], clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, list[float]]]:
    """Time every call of the functions during the block; yields the seconds by name."""
    spent: dict[str, list[float]] = {name: [] for _, name in watched}

    def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = clock()
            try:
                return function(*arguments, **named)
            finally:
                seconds.append(clock() - start)

        return call

    with ExitStack() as stack:
        for owner, name in watched:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), spent[name])))
        yield spent
