"""Write numbers for readers: 3.2M parameters, 5.8 times fewer, an interval in brackets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
NAMES = {
    "prefix_mamba": "Prefix Mamba",
    "prefix_simba": "Prefix SiMBA",
    "cross_simba": "Cross SiMBA",
    "cross_transformer": "Cross Transformer",
}

SCHEMES = {
    "cluster": "whole series drawn with replacement",
    "mixed": "noise of series and rows by a mixed model",
    "wild": "wild cluster bootstrap over series",
}
"""Description of a fit's resamples by scheme."""


def architecture(name: str) -> str:
    """Return an architecture's written name."""
    return NAMES.get(name, name)


def shortened(names: Sequence[str], most: int) -> dict[str, str]:
    """Return the names by themselves, those longer than `most` characters with their middle left out.

    Different names stay different: those whose both ends are equal are numbered.
    """
    distinct = list(dict.fromkeys(names))
    long = [name for name in distinct if len(name) > most]
    short = set(distinct) - set(long)
    for share in (0.6, 0.4, 0.8, 0.2, 0.95, 0.05):
        head = max(1, round((most - 1) * share))
        tail = max(1, most - 1 - head)
        found = {name: f"{name[:head].rstrip()}…{name[-tail:].lstrip()}" for name in long}
        if len(short.union(found.values())) == len(distinct):
            return {name: found.get(name, name) for name in distinct}
    seen: Counter[str] = Counter()
    for name, text in found.items():
        seen[text] += 1
        number = f" ({seen[text]})"
        found[name] = text[: most - len(number)] + number
    return {name: found.get(name, name) for name in distinct}


def human(value: float, digits: int = 3) -> str:
    """Write a count with its unit: 3.16M, 412k, 1.2B; plain digits below a thousand."""
    for scale, unit in UNITS:
        if abs(value) >= scale * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / scale, digits)}{unit}"
    return _significant(value, digits)


def number(value: float, digits: int = 3) -> str:
    """Write a number to so many significant digits; in powers of ten from a million on."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        exponent = math.floor(math.log10(abs(value)))
        superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{value / 10**exponent:.{digits - 1}f} × 10{superscript}"
    return _significant(value, digits)


def times(value: float) -> str:
    """Write a ratio: 5.8, 12, 0.53."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def saving(ratio: float, sign: str = " times") -> str:
    """Write a size ratio in words: 4.8 times fewer parameters."""
    return f"{times(max(ratio, 1 / ratio))}{sign} {'fewer' if ratio >= 1 else 'more'} parameters"


def between(ends: tuple[float | None, float | None] | None, digits: int = 3) -> str:
    """Write an interval in brackets; an end beyond any real ratio is unbounded, and an unknown one is open."""
    if ends is None:
        return "no interval"
    low, high = (
        "open" if end is None else number(end, digits) if abs(end) < 1e15 else "unbounded" for end in ends
    )
    return f"[{low}, {high}]"


def percent(value: float) -> str:
    """Write a relative error as a signed percentage."""
    return f"{100 * value:+.2f} %".replace("-", "−")


def counted(count: int, what: str) -> str:
    """Write a count of things: 1 row, 3 rows."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def budget(iterations: float | None, tokens: float) -> str:
    """Write a budget in iterations, or in tokens if those are None; one token stands for a budget that is not given."""
    if iterations is None and tokens <= 1:
        return "the budget of the table"
    return f"{human(tokens)} tokens" if iterations is None else f"{iterations:,.0f} iterations"


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
