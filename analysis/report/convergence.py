"""Quality of generated music against training iterations, beside published curves of the same family of metrics.

Only values with the same metric and settings compare, so each pair of them has a panel of its own. The published
figure (arXiv 2601.14786) has three families of metrics: Frechet distance, KL divergence and CLAP score. It does not say
which models embedded its audio. Its curves therefore have their own axis, at the right, and only shapes compare: how
soon an architecture levels off, and which of two is ahead. A proxy has no published curve.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from analysis import text as wording
from analysis.errors import InputError
from analysis.report.description import Axis, Figure, Panel, Series
from analysis.report.style import MARKERS, budget_label, colour, log_axis, shades

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("run_id", "architecture", "n_params", "iterations", "seed"),
    *("metric", "value", "n_prompts", "settings"),
)
"""Columns of a table of evaluations."""
NUMBERS = ("n_params", "iterations", "value")


@dataclass(frozen=True)
class Family:
    """Metrics that measure the same quantity by different models of audio."""

    key: str
    """Column of the published values."""
    title: str
    reading_error: float
    """Error of the values read from the published figure."""


FAMILIES = (
    Family("fd", "Fréchet distance (lower is better)", 0.5),
    Family("kl", "KL divergence (lower is better)", 0.02),
    Family("clap", "CLAP score (higher is better)", 0.001),
)
OTHERS = {
    "fd_mel_proxy": "Fréchet distance of mel spectra, a proxy (lower is better)",
    "ce": "Held-out cross-entropy, nats a token (lower is better)",
    "ppl": "Held-out perplexity (lower is better)",
}


def convergence_figures(evaluations: pd.DataFrame, names: Sequence[str] = ()) -> list[Figure]:
    """Describe each metric of a table with COLUMNS: families with published curves first, then proxies and losses.

    Architectures look as in the other figures, which are of `names`.
    Values of single codebooks are only in the table. Raises InputError if the table lacks a column or has a value that
    cannot be drawn.
    """
    _check(evaluations)
    found = [
        (title, str(metric), _figure(str(metric), str(settings), rows, title, names))
        for (metric, settings), rows in evaluations.groupby(["metric", "settings"], sort=False)
        if (title := _title(str(metric)))
    ]
    order = [family.title for family in FAMILIES] + list(OTHERS.values())
    return [figure for *_, figure in sorted(found, key=lambda one: (order.index(one[0]), one[1]))]


def together(figures: Sequence[Figure]) -> Figure:
    """Join the figures of all metrics as panels of one, for a file; a page is too narrow for that."""
    panels = tuple(panel for figure in figures for panel in figure.panels)
    return replace(figures[0], name="convergence", title="Convergence", panels=panels)


def family_of(metric: str) -> Family | None:
    """Return the family of a metric; None for a proxy and for a loss."""
    base = metric.partition("-")[0]
    if base.endswith("_proxy"):
        return None
    return next(
        (family for family in FAMILIES if base == family.key or base.startswith(f"{family.key}_")), None
    )


def _title(metric: str) -> str | None:
    family = family_of(metric)
    return family.title if family else OTHERS.get(metric.partition("-")[0])


def _check(evaluations: pd.DataFrame) -> None:
    missing = [name for name in COLUMNS if name not in evaluations.columns]
    if missing:
        raise InputError(
            f"evaluations: column {missing[0]} is missing; the table has {', '.join(map(str, evaluations.columns))}."
        )
    for name in NUMBERS:
        for run_id, value in zip(evaluations["run_id"], evaluations[name], strict=True):
            finite = isinstance(value, int | float | np.number) and np.isfinite(value)
            if not finite or (name != "value" and value <= 0):
                raise InputError(
                    f"evaluations: run {run_id}: {name}: {value!r} is not a number that can be drawn."
                )


def _figure(metric: str, settings: str, rows: pd.DataFrame, title: str, known: Sequence[str]) -> Figure:
    """Draw values as marks, the mean of seeds as a line, and published curves on an axis at the right."""
    prompts = " or ".join(f"{count:,}" for count in sorted({int(count) for count in rows["n_prompts"]}))
    seeds = bool(rows.duplicated(["architecture", "n_params", "iterations"]).any())
    caption = f"{metric}, settings {settings}, over {prompts} prompts or clips. " + (
        "Marks: seeds; lines: their mean." if seeds else "Each mark is a run."
    )
    series, right = list(_measured(metric, rows, known)), None
    family = family_of(metric)
    if family is not None:
        series += _published(family)
        right = Axis("published (dashed), other embedding")
        caption += (
            f" Dashed: the published curves, read from a figure to ±{family.reading_error:g}, on the axis at the "
            "right: they were measured on other prompts (MusicCaps) and with another embedding model, which the "
            "figure does not name, so that shapes compare and heights do not."
        )
    counts = [count for one in series for count in one.x]
    x = log_axis(budget_label("iterations"), counts, wording.human, pad=1.2)
    return Figure(
        name="convergence_" + re.sub(r"\W", "_", f"{metric}_{settings}"),
        title=title,
        caption=caption,
        panels=(Panel(title, x, Axis(metric), tuple(series), right=right),),
        inches=(6.4, 4.6),
    )


def _measured(metric: str, rows: pd.DataFrame, known: Sequence[str]) -> Iterator[Series]:
    """Yield a line through the means and the values of each model, in a lighter shade for a smaller model."""
    names = sorted(set(rows["architecture"].astype(str)))
    known = list(dict.fromkeys([*known, *names]))
    for name in names:
        arm = rows[rows["architecture"] == name].sort_values(["iterations", "seed"], kind="stable")
        models = arm.groupby("n_params")
        for i, ((n_params, own), tone) in enumerate(
            zip(models, shades(colour(name, known), len(models)), strict=True)
        ):
            label = f"{wording.architecture(name)} {wording.human(float(str(n_params)))}"
            means = own.groupby("iterations")["value"].mean()
            counts, values = own["iterations"].astype(float), own["value"].astype(float)
            yield Series(
                x=tuple(means.index.astype(float)),
                y=tuple(means.astype(float)),
                colour=tone,
                group=label,
                legend=label,
                dash="solid",
                width=2,
            )
            yield Series(
                x=tuple(counts),
                y=tuple(values),
                colour=tone,
                group=label,
                marker=MARKERS[i % len(MARKERS)],
                hover=tuple(
                    f"run {run_id}\n{label}, {count:,.0f} iterations\n{metric} {wording.number(value, 4)}"
                    for run_id, count, value in zip(own["run_id"], counts, values, strict=True)
                ),
                run_ids=tuple(own["run_id"].astype(str)),
            )


def _published(family: Family) -> Iterator[Series]:
    table = published_table()
    for architecture in dict.fromkeys(row["architecture"] for row in table):
        rows = [row for row in table if row["architecture"] == architecture]
        counts, values = (tuple(float(row[key]) for row in rows) for key in ("iterations", family.key))
        label = f"{wording.architecture(architecture)}, published"
        yield Series(
            x=counts,
            y=values,
            colour=colour(architecture, []),
            group=label,
            legend=label,
            dash="dash",
            width=1.2,
            marker="circle",
            size=4.5,
            fills=("white",),
            hover=tuple(
                f"{label}\n{count:,.0f} iterations\n{value:g} ± {family.reading_error:g}"
                for count, value in zip(counts, values, strict=True)
            ),
            right=True,
        )


@cache
def published_table() -> tuple[dict[str, str], ...]:
    """Return the values of the published figure, a row for each architecture and iteration count."""
    text = (files("analysis.report") / "paper_convergence.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
