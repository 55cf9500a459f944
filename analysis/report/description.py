"""A figure as plain values, independent of its renderers.

`static` and `interactive` draw any Figure. Texts are plain, without Plotly's markup or matplotlib's mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Marker = Literal[
    "circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star", "thin-x", "none"
]
Dash = Literal["none", "solid", "dash"]


@dataclass(frozen=True)
class Axis:
    """An axis; the renderer chooses ticks and limits that are not given."""

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
    """An arrow from one x to another at the height y, with a text above it."""

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
    summed: bool = False
    """True if a key of a drawn figure replaces the entry, which keeps its legend short; a page shows the entry."""
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


@dataclass(frozen=True)
class Panel:
    """A pair of axes, or a pair and a second vertical axis at the right."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    arrows: tuple[Arrow, ...] = ()
    keys: tuple[Series, ...] = ()
    """Further entries of a drawn legend, without values; the caption of a page explains them."""
    right: Axis | None = None


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
    shared_y: bool = True
    """True if all panels have the same vertical axis."""

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of panels, filled as evenly as possible."""
        rows = -(-len(self.panels) // self.columns)
        return rows, -(-len(self.panels) // rows)

    @property
    def shared_groups(self) -> set[str]:
        """Groups with series in several panels."""
        groups = [group for panel in self.panels for group in {one.group for one in panel.series}]
        return {group for group in groups if groups.count(group) > 1}
