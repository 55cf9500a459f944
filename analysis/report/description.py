"""A figure as plain values, independent of its renderers.

`static` and `interactive` draw any Figure. Texts are plain, without Plotly's markup or matplotlib's mathematics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from analysis.text import shortened

Marker = Literal[
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "triangle-down",
    "cross",
    "x",
    "star",
    "hourglass",
    "bowtie",
    "triangle-left",
    "triangle-right",
    "thin-x",
    "none",
]
Dash = Literal["none", "solid", "dash", "dot"]
WIDEST = 1e3  # above any width or size
ENTRY = 36
"""Most characters of a legend's entry."""


@dataclass(frozen=True)
class Axis:
    """An axis; the renderer chooses ticks and limits that are not given, and leaves out ticks that do not fit."""

    label: str
    limits: tuple[float, float] | None = None
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()
    """Positions and their texts."""


@dataclass(frozen=True)
class Band:
    """A transparent area between two curves, in the colour of its group."""

    x: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    colour: str
    group: str


@dataclass(frozen=True)
class Arrow:
    """An arrow from one x to another at the height y, with a text above it if it has one."""

    x: tuple[float, float]
    y: float
    text: str
    colour: str
    """Colour of the text; the arrow is in ink."""
    legend: str
    hover: tuple[str, str]


@dataclass(frozen=True)
class Series:
    """Values joined by a line, marked one by one, or both."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: str
    group: str
    """Series of one group share an entry of the legend, in all panels."""
    legend: str = ""
    """Text of the group's entry, at one of its series."""
    dash: Dash = "none"
    width: float = 1.8
    marker: Marker = "none"
    size: float = 6.0
    """Diameter of a marker in points."""
    fills: tuple[str, ...] = ()
    """Colour inside each marker, or inside all of them, "none" for a ring; by default `colour` with a white rim."""
    ends: tuple[tuple[float, float], ...] = ()
    """Both ends of an error bar at each value."""
    hover: tuple[str, ...] = ()
    """Lines of text under the pointer, at each value."""
    run_ids: tuple[str, ...] = ()
    right: bool = False
    """True if the values belong to the axis at the right."""
    cloud: bool = False
    """True for points so many that they are drawn as one image, without texts."""

    @property
    def fill(self) -> str:
        """Colour inside the mark of a legend's entry: full unless all marks are hollow."""
        return self.colour if not self.fills or self.colour in self.fills else self.fills[0]


@dataclass(frozen=True)
class Panel:
    """A pair of axes, or a pair and a second vertical axis at the right."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    arrows: tuple[Arrow, ...] = ()
    right: Axis | None = None


@dataclass(frozen=True)
class Entry:
    """An entry of a legend, in the style of the line and of the marks of its group."""

    text: str
    full: str
    """The whole text, of which `text` may be the beginning and the end."""
    group: str
    line: Series | None
    mark: Series | None


@dataclass(frozen=True)
class Figure:
    """Panels in rows under one title; its name is used for its files and its element on a page."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int = 2
    """Largest number of panels side by side."""
    inches: tuple[float, float] = (7.2, 4.6)
    """Width and height of a drawn panel."""
    keys: tuple[Series, ...] = ()
    """Further entries of the legend, without values; one of a group stands for it in all panels."""

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of panels, filled as evenly as possible."""
        rows = -(-len(self.panels) // self.columns)
        return rows, -(-len(self.panels) // rows)

    @cached_property
    def legend(self) -> list[Entry]:
        """Entries of the whole figure: of groups in several panels, of keys, and all of a single panel."""
        return _entries([*self._common(), *self.keys])

    def legend_of(self, panel: Panel) -> list[Entry]:
        """Return the entries of one panel, whose groups no other panel has."""
        elsewhere = {entry.group for entry in self.legend}
        return _entries([one for one in _legible(panel) if one.group not in elsewhere])

    def _common(self) -> Iterable[Series]:
        if len(self.panels) == 1:
            return _legible(self.panels[0])
        named = [{one.group for one in _legible(panel) if one.legend} for panel in self.panels]
        shared = {group for groups in named for group in groups if sum(group in own for own in named) > 1}
        return [one for panel in self.panels for one in _legible(panel) if one.group in shared]


def _legible(panel: Panel) -> list[Series]:
    """Return all that a panel's legend may name, arrows included."""
    dotted = (
        Series(arrow.x, (arrow.y,) * 2, arrow.colour, arrow.legend, arrow.legend, "dot", 1.3)
        for arrow in panel.arrows
    )
    return [*panel.series, *dotted]


def _entries(series: Sequence[Series]) -> list[Entry]:
    """Return an entry for each group with a text, in the style of what has the text, else of the boldest."""
    groups: dict[str, list[Series]] = {}
    for one in series:
        groups.setdefault(one.group, []).append(one)
    named = {
        group: found for group, members in groups.items() if (found := [one for one in members if one.legend])
    }
    texts = shortened([members[-1].legend for members in named.values()], ENTRY)
    entries = []
    for group, titled in named.items():
        members = [*titled, *(one for one in groups[group] if one not in titled and not one.cloud)]
        lines = [one for one in members if one.dash != "none" or one.ends]
        marks = [one for one in members if one.marker != "none"]
        full = titled[-1].legend
        line = max(lines, key=lambda one: WIDEST if one in titled else one.width, default=None)
        mark = max(marks, key=lambda one: WIDEST if one in titled else one.size, default=None)
        entries.append(Entry(texts[full], full, group, line, mark))
    return entries
