"""A figure as plain values: what stands in it, and nothing of how a file or a page draws it.

`static` and `interactive` draw any Figure. Texts are plain: neither Plotly's markup nor matplotlib's mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Marker = Literal[
    "circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star", "thin-x", "none"
]
Dash = Literal["none", "solid", "dash"]


@dataclass(frozen=True)
class Axis:
    """One axis; without ticks the renderer chooses them, without limits they follow the values."""

    label: str
    limits: tuple[float, float] | None = None
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()
    """Positions and their texts."""


@dataclass(frozen=True)
class Band:
    """Area between two curves, in the colour of its group and see-through."""

    x: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    colour: str
    group: str


@dataclass(frozen=True)
class Arrow:
    """From one x to another at the height y, with a text above it."""

    x: tuple[float, float]
    y: float
    text: str
    colour: str
    """Of the text; the arrow itself is in ink."""
    legend: str
    hover: tuple[str, str]


@dataclass(frozen=True)
class Series:
    """Values joined by a line, marked one by one, or both."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: str
    group: str
    """Series of one group share an entry of the legend; a group of several panels has one entry for all of them."""
    legend: str = ""
    """The text of the group's entry, at one of its series."""
    summed: bool = False
    """Whether a drawn figure leaves the entry to a key, so that its legend stays short; a page has room."""
    dash: Dash = "none"
    width: float = 1.8
    marker: Marker = "none"
    size: float = 6.0
    """Diameter of a marker in points."""
    fills: tuple[str, ...] = ()
    """A colour within each marker or for all of them, "none" for a ring; else the series' own, with a white rim."""
    ends: tuple[tuple[float, float], ...] = ()
    """Both ends of an error bar at each value."""
    hover: tuple[str, ...] = ()
    """Lines of text under the pointer, at each value."""
    run_ids: tuple[str, ...] = ()
    right: bool = False
    """Whether the values belong to the axis at the right."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes, or a pair and a second vertical one at the right."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    bands: tuple[Band, ...] = ()
    arrows: tuple[Arrow, ...] = ()
    keys: tuple[Series, ...] = ()
    """Further entries of a drawn legend, without values: a page says the same in its caption."""
    right: Axis | None = None


@dataclass(frozen=True)
class Figure:
    """Panels in rows under one title; its name is that of its files and of its element on a page."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int = 2
    """The most panels side by side."""
    inches: tuple[float, float] = (7.2, 4.6)
    """Width and height of a drawn panel."""
    shared_y: bool = field(default=True)
    """Whether all panels have the same vertical axis."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the panels, filled as evenly as may be."""
        rows = -(-len(self.panels) // self.columns)
        return rows, -(-len(self.panels) // rows)

    @property
    def shared_groups(self) -> set[str]:
        """Groups that stand in several panels."""
        groups = [group for panel in self.panels for group in {one.group for one in panel.series}]
        return {group for group in groups if groups.count(group) > 1}


def labelled(ticks: Sequence[float], text: Callable[[float], str]) -> tuple[tuple[float, str], ...]:
    """Ticks with their texts."""
    return tuple((tick, text(tick)) for tick in ticks)
