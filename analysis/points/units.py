"""Numbers as people write them (125M, 1.3B, 1,300,000), and columns that are in thousands, millions or billions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import InputError

if TYPE_CHECKING:
    from analysis.laws.law import Array

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
WITH_UNIT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([kKmMbBgGtT])")
GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(?![\d,])")

LEAST_COUNT = 1000.0
"""Sizes and tokens below it are in another unit: no model has so few parameters."""
SIZES = ("n_params", "n_params_non_embedding", "tokens", "unique_tokens", "flops")
"""Columns whose unit is checked, each after the columns by which its unit is judged."""
WRITTEN = {1e3: "thousands", 1e6: "millions", 1e9: "billions", 1e12: "trillions"}
OF_FLOPS = {
    1e12: "teraFLOPs",
    1e15: "petaFLOPs",
    1e18: "exaFLOPs",
    8.64e19: "petaFLOP/s-days",
    1e21: "zettaFLOPs",
}
TOKENS_A_PARAMETER = 20.0
"""Hoffmann et al. 2022 (arXiv 2203.15556), section 3: near the optimum of most studies."""
FEWEST_TOKENS = 0.1
"""Tokens a parameter below which no study trains: sizes that would need it are in millions, not in billions."""
SHOWN = 5


def number_of(text: str, *, comma_is_decimal: bool = False) -> float:
    """Return the number a text stands for: 1.3e9, 1.3B, 125M, 1,300,000; raises ValueError.

    Where a comma may be a decimal one, 1,300 is refused, and 1,300,000 is not.
    """
    try:
        return float(text)
    except ValueError:
        pass
    grouped = GROUPED.match(text)
    if grouped is not None:
        if comma_is_decimal and grouped[0].count(",") == 1:
            raise ValueError(
                f"may be {text.replace(',', '')} or {text.replace(',', '.', 1)}; write it without a comma"
            )
        text = grouped[0].replace(",", "") + text[grouped.end() :]
    found = WITH_UNIT.fullmatch(text)
    if found is None:
        return float(text)
    # Decimal, so that 30.4167M is the number that 3.04167e7 is.
    return float(Decimal(found[1]) * Decimal(UNITS[found[2].lower()]))


def unit_named(text: str, where: str) -> float:
    """Return the factor of a unit: k, M, B, T or a number; raises InputError that begins with `where`."""
    try:
        factor = UNITS[text.lower()] if text.lower() in UNITS else float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < 1e30:
        raise InputError(f"{where}: {text} is no unit; give k, M, B, T, or a number such as 1e18.")
    return factor


def refuse_units(
    columns: Mapping[str, Sequence[float]],
    names: Mapping[str, str],
    rows: Sequence[int],
    source: str,
) -> None:
    """Raise InputError for a column of sizes, tokens or FLOPs that has values below a thousand.

    `columns` has the values by this project's names, not a number where a row has none, and `names` the file's names.
    """
    values = {name: np.asarray(columns[name], dtype=np.float64) for name in SIZES if name in columns}
    for name, found in values.items():
        if name == "n_params_non_embedding":  # a tiny model has few
            continue
        used = found[np.isfinite(found) & (found > 0)]
        small = np.flatnonzero(found < LEAST_COUNT)
        if not len(small):
            continue
        theirs = names.get(name, name)
        called = f"column {theirs}" + (f" ({name})" if theirs != name else "")
        if used.max() >= 1e6 and len(small) < len(used) / 2:
            row, value = rows[int(small[0])], found[small[0]]
            raise InputError(
                f"{source}: row {row}, column {theirs}: {value:g} is below a thousand, where other rows reach "
                f"{used.max():g}; write it in full, or with its unit, such as 125M or 1.3B."
            )
        factor, unit = _likely(name, used, values)
        distinct = sorted({f"{value:g}": value for value in used}.items(), key=lambda pair: pair[1])
        shown = ", ".join(text for text, _ in distinct[:SHOWN])
        if len(distinct) > SHOWN:
            shown += f", ... {distinct[-1][0]}"
        letter = next((key.upper() for key, one in UNITS.items() if one == factor and key), f"{factor:g}")
        raise InputError(
            f"{source}: {called} has values below a thousand ({shown}), which seem to be {unit}; give "
            f"--unit {name}={letter.replace('K', 'k')}, or write the values in full or with a unit, as 125M or 1.3B."
        )


def _likely(name: str, used: Array, columns: Mapping[str, Array]) -> tuple[float, str]:
    """Return the factor and the name of the unit that a column of small values seems to be in."""
    middle = float(np.exp(np.log(used).mean()))
    expected = None
    size, tokens = (_middle(columns.get(other)) for other in ("n_params", "tokens"))
    if name in {"tokens", "unique_tokens"} and size:
        expected = TOKENS_A_PARAMETER * size
    if name == "flops" and size and tokens:
        expected = 6 * size * tokens
    units = OF_FLOPS if name == "flops" else WRITTEN
    if expected is not None:
        factor = min(units, key=lambda one: abs(np.log(one * middle / expected)))
    elif name == "flops":
        factor = 1e18
    else:
        factor = 1e9 if used.min() < 1 or used.max() < 100 else 1e6
        if (
            name in {"n_params", "n_params_non_embedding"}
            and tokens
            and factor * middle > tokens / FEWEST_TOKENS
        ):
            factor = 1e6
    return factor, units[factor]


def _middle(values: Array | None) -> float | None:
    """Return the geometric mean of the numbers above 0; None if there are none."""
    used = values[np.isfinite(values) & (values > 0)] if values is not None else ()
    return float(np.exp(np.log(used).mean())) if len(used) else None
