"""Architectures differ in colour and mark, for colour-blind readers and in grey; levels and long names."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from analysis.report.levels import levels
from analysis.report.style import COLOURS, MARKERS, SHAPES, apart, log_axis, look
from analysis.text import human, shortened

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(colours: tuple[str, ...], blindness: str) -> np.ndarray:
    """CIELAB of colours as a reader sees them."""
    rgb = np.array([[int(one[i : i + 2], 16) / 255 for i in (1, 3, 5)] for one in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(BLINDNESS[blindness]).T, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (np.cbrt(seen @ to_xyz.T / [0.9505, 1, 1.089])).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_twelve_colours_differ_for_every_reader(blindness: str) -> None:
    seen = lab(COLOURS, blindness)
    nearest = min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2))
    assert len(COLOURS) == 12
    assert nearest > 12


@pytest.mark.parametrize("named", [0, 1, 4])
def test_twelve_architectures_differ_in_colour_and_in_mark(named: int) -> None:
    ours = ["cross_transformer", "prefix_simba", "cross_simba", "prefix_mamba"][:named]
    names = [*ours, *(f"foreign-{k}" for k in range(12 - named))]
    looks = [look(name, names) for name in names]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 12
    many = [f"arm-{k}" for k in range(130)]
    assert len({look(name, many) for name in many}) == 130


def test_an_architecture_of_ours_looks_alike_among_any_others() -> None:
    for name in ("cross_transformer", "prefix_mamba"):
        assert look(name, [name]) == look(name, ["a", "b", name, "prefix_simba"])


def test_every_mark_has_a_shape() -> None:
    assert set(MARKERS) == {"circle", *SHAPES}


def test_levels_join_rounding_and_keep_real_steps() -> None:
    rounded = np.array([1.000e9, 1.004e9, 0.996e9, 2e9, 2.1e9, 4e9, 4.0001e9])
    found = levels(rounded)
    assert [(one.low, one.high) for one in found] == [
        (0.996e9, 1.004e9),
        (2e9, 2e9),
        (2.1e9, 2.1e9),
        (4e9, 4.0001e9),
    ]
    for one in found:
        assert one.at in rounded
        assert one.single


def test_many_levels_are_joined_and_hold_every_value_once() -> None:
    values = np.geomspace(1, 100, 60)
    found = levels(values)
    assert len(found) == 8
    assert sum(one.holds(values).astype(int) for one in found).tolist() == [1] * 60
    assert found[-1].at == values[-1]
    assert not found[0].single


def test_values_one_step_apart_never_chain_into_one_level() -> None:
    found = levels(np.arange(50.0, 50_050.0, 50.0), None)
    assert max(one.high / one.low for one in found) <= 1.02


NAMES = [
    "short",
    "x" * 60,
    "a-very-long-name-of-an-architecture-d16",
    "a-very-long-name-of-an-architecture-d64",
]


@pytest.mark.parametrize(
    "names", [NAMES, [f"{'a' * 30}{k}{'b' * 30}" for k in range(12)], [f"{'a' * 59}{k}" for k in range(3)]]
)
def test_long_names_are_shortened_and_stay_different(names: list[str]) -> None:
    found = shortened(names, 28)
    assert list(found) == names
    assert all(len(text) <= 28 for text in found.values())
    assert len(set(found.values())) == len(names)
    assert found.get("short", "short") == "short"


def test_ticks_that_would_touch_are_left_out() -> None:
    axis = log_axis("parameters", [1e5, 1e7], human, pad=1.2, at=[1e5, 1.05e5, 1e6, 1.02e6, 1e7])
    assert [text for _, text in apart(axis, 400, 10)] == ["100k", "1M", "10M"]
    assert len(apart(axis, 4000, 10)) == 4
