"""Fitted curves with their 95 % intervals, points and legend entries, as series of a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import text as wording
from analysis.findings.curve import Curve, spaced
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array
from analysis.points.checks import data_column
from analysis.report.description import Axis, Band, Dash, Marker, Series
from analysis.report.levels import MOST, Level, levels
from analysis.report.style import GREY, INK, budget_label, log_axis, look, loss_axis

if TYPE_CHECKING:
    import pandas as pd

    from analysis.findings.results import FitDocument
    from analysis.points.table import CheckedPoints

STEPS = 60
MARGIN = 1.12  # factor by which a curve extends beyond the points it was fitted to
TOLD = 6000
"""Most points of a figure that a page draws one by one, each with its text; it draws all others as an image."""
REACH = 3.0
NEAR = 1.15
"""Factor beyond the losses seen up to which an axis is extended for those predicted."""
Told = tuple[tuple[str, ...], tuple[str, ...]]
"""Texts under the pointer and run ids, each for every mark."""


@dataclass(frozen=True)
class FittedCurve:
    """An architecture's law at its estimate and its resamples, with the points."""

    name: str
    curve: Curve
    budget: str  # iterations or tokens

    @property
    def frame(self) -> pd.DataFrame:
        """Points of the fit."""
        return self.curve.frame

    def values(self, column: str) -> Array:
        """Return a column of the points (points)."""
        return floats(self.frame[column])

    def levels(self, column: str) -> list[Level]:
        """Return the levels of a column of these points."""
        return levels(self.values(column))

    def _data(self, budget: float) -> float:
        """Return the law's data input at a budget."""
        counted = self.budget == "iterations"
        return (
            budget if counted == self.curve.law.counts_iterations else self.curve.tokens_an_iteration * budget
        )

    def line(self, held: float, tone: str, group: str, *, by_size: bool = True) -> tuple[Series, Band]:
        """Return the loss against parameters at one budget, or against budgets at one size, and its interval."""
        trained = self.values("n_params" if by_size else self.budget)
        x = np.geomspace(trained.min() / MARGIN, trained.max() * MARGIN, STEPS)
        if by_size:
            at = [(size, self._data(held)) for size in x]
        else:
            at = [(held, self._data(budget)) for budget in x]
        values = np.stack([self.curve.loss(size, data) for size, data in at], axis=1)
        seen = self.frame["loss"]
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
        unit = data_column(points.frame)
        laws = []
        for name in names:
            fit, frame = document.architectures[name], points.of(name)
            params = np.vstack([[list(fit.params.values())], document.draws(name)])
            laws.append(FittedCurve(name, Curve(law, params, frame), unit))
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
    def inches(self) -> tuple[float, float]:
        """Width and height of a panel for one architecture."""
        return (6.4, 4.4) if len(self.laws) == 1 else (5.0, 3.9) if self.columns == 2 else (3.9, 3.1)

    @property
    def columns(self) -> int:
        """Largest number of panels side by side, one for each architecture."""
        return 2 if len(self.laws) <= 4 else 3

    @cached_property
    def count(self) -> int:
        """Number of points of all architectures."""
        return sum(len(law.frame) for law in self.laws)

    @cached_property
    def seeds(self) -> bool:
        """True if some configuration was trained under several seeds."""
        return any(fit.seed_noise for fit in self.document.architectures.values())

    @property
    def told(self) -> str:
        """Sentence of a caption that says how many points have a text on a page, or an empty string."""
        if self.count <= TOLD:
            return ""
        return f" All {self.count:,} points are drawn; on the page the pointer names about {TOLD:,} of them."

    def values(self, column: str) -> Array:
        """Return a column of all points."""
        return np.concatenate([law.values(column) for law in self.laws])

    def levels(self, column: str) -> list[Level] | None:
        """Return the levels of a column for all architectures; None if each has sizes of its own.

        Budgets have the same levels for all, so that equal budgets look equal.
        """
        found = levels(self.values(column), None)
        most = max(len(levels(law.values(column), None)) for law in self.laws)
        return levels(self.values(column)) if column != "n_params" or len(found) <= max(MOST, most) else None

    def tone(self, name: str) -> str:
        """Return the colour of an architecture."""
        return look(name, list(self.document.architectures))[0]

    def mark(self, name: str) -> Marker:
        """Return the marker of an architecture."""
        return look(name, list(self.document.architectures))[1]

    def written(self, column: str, level: Level) -> str:
        """Write a level of sizes or budgets with its unit."""
        unit = "parameters" if column == "n_params" else self.unit
        text = counted(column)
        return f"{text(level.at) if level.single else f'{text(level.low)} to {text(level.high)}'} {unit}"

    def sizes(self) -> Axis:
        """Return a horizontal axis over all trained sizes."""
        return log_axis("parameters", self.values("n_params"), wording.human, pad=1.25)

    def budgets(self) -> Axis:
        """Return a horizontal axis over all trained budgets, with a tick at each if they are few and well apart."""
        budgets = [level.at for level in levels(self.values(self.unit), None)]
        few = len(budgets) <= 6 and all(high > 1.2 * low for low, high in pairwise(budgets))
        return budget_axis(self.unit, self.values(self.unit), pad=1.2, at=budgets if few else ())

    def losses(self) -> Axis:
        """Return a vertical axis over all losses, and over those predicted for held-out points that are not far off."""
        seen = self.values("loss")
        splits = (
            split
            for fit in self.document.architectures.values()
            for split in (fit.heldout.largest_size, fit.heldout.longest_budget)
        )
        predicted = np.array([one.predicted for split in splits if split for one in split.points])
        near = (predicted > seen.min() / NEAR) & (predicted < seen.max() * NEAR)
        return loss_axis(np.concatenate([seen, predicted[near]]))

    def dots(
        self, like: Series, rows: pd.DataFrame, x: str, y: Array | None = None, also: Sequence[str] = ()
    ) -> list[Series]:
        """Return points that look like a series, each with a description of its run; of very many, some without.

        `x` is a column of the rows, y (rows) are their losses unless given, and `also` (rows) ends the descriptions.
        """
        along, height = floats(rows[x]), floats(rows["loss"]) if y is None else y

        def tell(places: list[int]) -> Told:
            texts, run_ids = _told(rows.iloc[places])
            if also:
                texts = tuple(f"{text}\n{also[place]}" for text, place in zip(texts, places, strict=True))
            return texts, run_ids

        return self.split(like, along, height, tell)

    def split(self, like: Series, x: Array, y: Array, tell: Callable[[list[int]], Told]) -> list[Series]:
        """Return marks as a series with texts and, if the figure has very many, one before it without."""
        share = min(1.0, TOLD / self.count)
        places = spaced(len(x), int(np.ceil(share * len(x))))
        rest = np.setdiff1d(np.arange(len(x)), places)
        found = []
        if len(rest):
            found.append(replace(like, x=tuple(x[rest].tolist()), y=tuple(y[rest].tolist()), cloud=True))
        if places:
            hover, run_ids = tell(places)
            one = replace(like, x=tuple(x[places].tolist()), y=tuple(y[places].tolist()))
            found.append(replace(one, hover=hover, run_ids=run_ids))
        return found


def budget_axis(unit: str, budgets: Iterable[float], *, pad: float, at: Sequence[float]) -> Axis:
    """Return a logarithmic axis of budgets, with ticks at round values or `at` these."""
    return log_axis(budget_label(unit), budgets, counted(unit), pad=pad, at=at)


def counted(unit: str) -> Callable[[float], str]:
    """Return the function that writes sizes or budgets in a unit."""
    return (lambda value: f"{value:,.0f}") if unit == "iterations" else wording.human


def _told(rows: pd.DataFrame) -> Told:
    """Return the texts that describe rows, and their run ids."""
    hover = []
    columns = ["run_id", "n_params", "tokens", "iterations", "loss", "seed"]
    for run_id, n_params, tokens, iterations, loss, seed in rows[columns].itertuples(index=False):
        budget = wording.budget(None if np.isnan(iterations) else float(iterations), float(tokens))
        seed_text = "" if np.isnan(seed) else f", seed {seed:.0f}"
        hover.append(
            f"run {run_id}\n{wording.human(n_params)} parameters, {budget}{seed_text}\n"
            f"loss {loss:.4f} nats a token"
        )
    return tuple(hover), tuple(map(str, rows["run_id"]))


def level(height: float, x: Axis, dash: Dash, legend: str = "", *, tone: str = GREY) -> Series:
    """Return a horizontal line over the whole axis."""
    assert x.limits is not None
    return Series(x.limits, (height, height), tone, f"level {height}", legend, dash, 1.2)


def key(text: str, marker: Marker, tone: str = INK, group: str = "", **looks: Any) -> Series:
    """Return an entry of a legend that stands for marks in several colours, by default for none of its own."""
    return Series((), (), tone, group or text, text, width=1.1, marker=marker, **looks)


def floats(column: pd.Series) -> Array:
    """Return a column of numbers as an array."""
    return column.to_numpy(dtype=np.float64)
