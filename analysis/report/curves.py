"""Fitted curves with their 95 % intervals, points and legend entries, as series of a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import text as wording
from analysis.findings.curve import Curve, spaced, thinned
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array
from analysis.points.checks import data_column
from analysis.report.description import Axis, Band, Dash, Marker, Series
from analysis.report.style import GREY, INK, budget_label, colour, log_axis, loss_axis

if TYPE_CHECKING:
    import pandas as pd

    from analysis.findings.results import FitDocument
    from analysis.points.table import CheckedPoints

STEPS = 60
MARGIN = 1.12  # factor by which a curve extends beyond the points it was fitted to
MANY = 8
DRAWN = 2000
"""Most points of an architecture that a figure draws at one budget or size, or in all: a page stays quick."""
REACH = 3.0


@dataclass(frozen=True)
class FittedCurve:
    """An architecture's law at its estimate and its resamples, with the points."""

    name: str
    curve: Curve
    budget: str  # iterations or tokens

    @property
    def budgets(self) -> Array:
        """Trained budgets in ascending order, at most 8 of them."""
        return thinned(np.unique(floats(self.curve.frame[self.budget])), MANY)

    @property
    def sizes(self) -> Array:
        """Trained sizes in ascending order, at most 8 of them."""
        return thinned(self.curve.sizes, MANY)

    def written(self, budget: float) -> str:
        """Write a budget with its unit."""
        return wording.budget(budget if self.budget == "iterations" else None, budget)

    def rows(self, column: str, value: float) -> pd.DataFrame:
        """Return the points with this value in a column, evenly spaced ones of very many."""
        return drawn(self.curve.frame[self.curve.frame[column] == value])

    def line(self, held: float, tone: str, group: str, *, by_size: bool = True) -> tuple[Series, Band]:
        """Return the loss against parameters at one budget, or against budgets at one size, and its interval."""
        trained = self.curve.sizes if by_size else self.budgets
        x = np.geomspace(trained[0] / MARGIN, trained[-1] * MARGIN, STEPS)
        at = [(value, held) if by_size else (held, value) for value in x]
        data = self.curve.data if self.budget == "iterations" else lambda _, tokens: tokens
        values = np.stack([self.curve.loss(n, data(budget, budget)) for n, budget in at], axis=1)
        seen = self.curve.frame["loss"]
        low, high = np.percentile(values[1:] if len(values) > 1 else values, [2.5, 97.5], axis=0)
        # An interval without an end is cut far outside the points, so that the axis has an end.
        low, high = np.clip([low, high], seen.min() / REACH, seen.max() * REACH)
        along, loss, below, above = (tuple(row.tolist()) for row in (x, values[0], low, high))
        return Series(along, loss, tone, group, dash="solid"), Band(along, below, above, tone, group)


@dataclass(frozen=True)
class Scene:
    """The fitted curves with their points, and the document: the source of all figures of a fit."""

    laws: Sequence[FittedCurve]
    document: FitDocument

    @classmethod
    def of(cls, points: CheckedPoints, document: FitDocument) -> Scene:
        """Join the fits of a document with their points, the reference first."""
        law = law_named(document.law)
        names = sorted(document.architectures, key=lambda name: (name != document.comparison.reference, name))
        laws = []
        for name in names:
            fit, frame = document.architectures[name], points.of(name)
            params = np.vstack([[list(fit.params.values())], document.draws(name)])
            laws.append(FittedCurve(name, Curve(law, params, frame), data_column(frame)))
        return cls(laws, document)

    @property
    def names(self) -> list[str]:
        """Architectures, the reference first."""
        return [law.name for law in self.laws]

    @property
    def unit(self) -> str:
        """Unit of all budgets, `iterations` or `tokens`."""
        return self.laws[0].budget

    @property
    def left_out(self) -> str:
        """Sentence of a caption that says which points are not drawn, or an empty string."""
        if all(len(law.curve.frame) <= DRAWN for law in self.laws):
            return ""
        return f" At most {DRAWN:,} points of a kind are drawn, evenly spaced among them; the fit used all."

    @property
    def inches(self) -> tuple[float, float]:
        """Width and height of a panel for one architecture."""
        return (5.2 if len(self.laws) > 1 else 6.4), 4.7

    def tone(self, name: str) -> str:
        """Return the colour of an architecture."""
        return colour(name, self.names)

    def sizes(self) -> Axis:
        """Return a horizontal axis over all trained sizes."""
        trained = np.concatenate([law.curve.sizes for law in self.laws])
        return log_axis("parameters", trained, wording.human, pad=1.25)

    def budgets(self) -> Axis:
        """Return a horizontal axis over all trained budgets, with a tick at each if they are few and well apart."""
        budgets = np.unique(np.concatenate([law.budgets for law in self.laws]))
        few = len(budgets) <= 6 and (len(budgets) < 2 or float((budgets[1:] / budgets[:-1]).min()) > 1.2)
        return budget_axis(self.unit, budgets, pad=1.2, at=budgets.tolist() if few else ())

    def losses(self) -> Axis:
        """Return a vertical axis over all losses."""
        return loss_axis(np.concatenate([floats(law.curve.frame["loss"]) for law in self.laws]))


def drawn(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that a figure draws: all, or evenly spaced ones of very many."""
    return rows.iloc[spaced(len(rows), DRAWN)]


def budget_axis(unit: str, budgets: Iterable[float], *, pad: float, at: Sequence[float]) -> Axis:
    """Return a logarithmic axis of budgets, with ticks at round values or `at` these."""
    return log_axis(budget_label(unit), budgets, counted(unit), pad=pad, at=at)


def counted(unit: str) -> Callable[[float], str]:
    """Return the function that writes budgets in a unit."""
    return (lambda value: f"{value:,.0f}") if unit == "iterations" else wording.human


def dots(
    rows: pd.DataFrame, column: str, tone: str, group: str, marker: Marker = "circle", size: float = 6
) -> Series:
    """Return points in one colour, each with a description of its run."""
    hover = []
    columns = ["run_id", "n_params", "tokens", "iterations", "loss", "seed"]
    for run_id, n_params, tokens, iterations, loss, seed in rows[columns].itertuples(index=False):
        budget = wording.budget(None if np.isnan(iterations) else float(iterations), float(tokens))
        seed_text = "" if np.isnan(seed) else f", seed {seed:.0f}"
        hover.append(
            f"run {run_id}\n{wording.human(n_params)} parameters, {budget}{seed_text}\n"
            f"loss {loss:.4f} nats a token"
        )
    return Series(
        x=tuple(floats(rows[column]).tolist()),
        y=tuple(floats(rows["loss"]).tolist()),
        colour=tone,
        group=group,
        marker=marker,
        size=size,
        hover=tuple(hover),
        run_ids=tuple(map(str, rows["run_id"])),
    )


def marks(
    x: Iterable[float], y: Iterable[float], label: str, marker: Marker, size: float, hover: Iterable[str] = ()
) -> Series:
    """Return points left out of a fit, or its predictions for them, in ink."""
    return Series(
        tuple(x), tuple(y), INK, label, label, marker=marker, size=size, fills=("none",), hover=tuple(hover)
    )


def level(
    height: float, x: Axis, dash: Dash, legend: str = "", *, tone: str = GREY, summed: bool = False
) -> Series:
    """Return a horizontal line over the whole axis."""
    assert x.limits is not None
    return Series(x.limits, (height, height), tone, f"level {height}", legend, summed, dash, 1.2)


def key(text: str, marker: Marker, tone: str = INK, **looks: Any) -> Series:
    """Return an entry of a drawn legend that stands for marks in several colours."""
    return Series((), (), tone, text, text, width=1.1, marker=marker, **looks)


def floats(column: pd.Series) -> Array:
    """Return a column of numbers as an array."""
    return column.to_numpy(dtype=np.float64)
