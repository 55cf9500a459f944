"""Evaluations against iterations: all values are drawn, with published curves for their own metrics only."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.report.convergence import COLUMNS, convergence_figures, family_of, published_table
from analysis.report.description import Figure, Series

METRICS = ("ce", "ppl", "ce_0", "fd_mel_proxy-99", "clap_score-5e", "kl_softmax_ast-2d", "fd_clap-5e")


def evaluations(metrics: tuple[str, ...] = METRICS, **changes: Any) -> pd.DataFrame:
    """Two architectures, one in two sizes, at three iteration counts; the smallest with two seeds."""
    rows = []
    for metric in metrics:
        for architecture, n_params, seeds in (
            ("prefix_simba", 72e6, (0, 1)),
            ("prefix_simba", 281e6, (0,)),
            ("cross_transformer", 280e6, (0,)),
        ):
            for iterations in (20_000, 5_000, 100_000):
                for seed in seeds:
                    row: dict[str, Any] = {
                        "run_id": f"{architecture}-{n_params:.0f}-{iterations}-{seed}",
                        "architecture": architecture,
                        "n_params": int(n_params),
                        "iterations": iterations,
                        "seed": seed,
                        "metric": metric,
                        "value": 1 + 1e5 / iterations + seed / 10 + n_params / 1e9,
                        "n_prompts": 16,
                        "settings": "held-out" if metric.startswith(("ce", "ppl")) else "0a1b2c",
                    }
                    rows.append(row | changes)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_a_panel_is_one_metric_under_one_set_of_settings_families_first() -> None:
    table = pd.concat([evaluations(), evaluations(("fd_clap-5e",), settings="other")])
    assert [figure.name.removeprefix("convergence_") for figure in convergence_figures(table)] == [
        "fd_clap_5e_0a1b2c",
        "fd_clap_5e_other",
        "kl_softmax_ast_2d_0a1b2c",
        "clap_score_5e_0a1b2c",
        "fd_mel_proxy_99_0a1b2c",
        "ce_held_out",
        "ppl_held_out",
    ]


@pytest.mark.parametrize(
    ("metric", "key"),
    [
        ("fd_clap-5e", "fd"),
        ("fd_mel_proxy-99", None),
        ("kl_ast", "kl"),
        ("kl_softmax_ast-2d", "kl"),
        ("clap_score", "clap"),
        ("ce", None),
        ("ppl_3", None),
        ("fdx", None),
    ],
)
def test_published_curves_belong_to_a_family_and_never_to_a_proxy(metric: str, key: str | None) -> None:
    family = family_of(metric)
    assert (family.key if family else None) == key


def test_the_published_values_are_those_that_were_read_from_the_figure() -> None:
    rows = published_table()
    counts = [5000, 10000, 15000, 20000, 40000, 60000, 80000, 100000]
    assert [int(row["iterations"]) for row in rows] == [*counts, *counts, 400_000]
    first, last = rows[0], rows[-1]
    assert list(first.values()) == ["prefix_simba", "5000", "163.7", "5.17", "0.060"]
    assert list(last.values()) == ["cross_transformer", "400000", "72.0", "1.70", "0.212"]


def series_of(metric: str) -> tuple[Figure, tuple[Series, ...]]:
    (figure,) = convergence_figures(evaluations((metric,)))
    return figure, figure.panels[0].series


def test_every_value_is_a_dot_and_lines_go_through_the_means_of_seeds() -> None:
    _, series = series_of("clap_score-5e")
    table = evaluations(("clap_score-5e",))
    dots = [one for one in series if one.marker != "none" and not one.right]
    assert sorted(y for one in dots for y in one.y) == sorted(table["value"])
    hovered = "\n".join(text for one in dots for text in one.hover)
    assert all(f"run {run_id}\n" in hovered for run_id in table["run_id"])
    line = next(one for one in series if one.dash == "solid" and "72M" in one.legend)
    assert line.x == (5_000, 20_000, 100_000)
    assert line.y == pytest.approx([1 + 1e5 / count + 0.05 + 0.072 for count in line.x])


def test_published_curves_have_an_axis_of_their_own() -> None:
    figure, series = series_of("fd_clap-5e")
    published = [one for one in series if one.legend.endswith(", published")]
    assert [one.y[0] for one in published] == [163.7, 134.0]
    assert all(one.right for one in published)
    assert figure.panels[0].right is not None
    assert "another embedding model" in figure.caption
    assert "±0.5" in figure.caption


@pytest.mark.parametrize("metric", ["fd_mel_proxy-99", "ce"])
def test_a_proxy_and_a_loss_stand_alone(metric: str) -> None:
    figure, series = series_of(metric)
    assert not any("published" in one.legend for one in series)
    assert figure.panels[0].right is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value": float("nan")}, "value: nan"),
        ({"value": "good"}, "value: 'good'"),
        ({"iterations": 0}, "iterations: 0"),
        ({"n_params": None}, "n_params: None"),
    ],
)
def test_a_value_that_cannot_be_drawn_and_a_missing_column_are_named(
    changes: dict[str, Any], said: str
) -> None:
    table = evaluations(("ce",), **changes)
    with pytest.raises(InputError, match=f"run prefix_simba-72000000-20000-0: {said}"):
        convergence_figures(table)
    with pytest.raises(InputError, match="column settings is missing"):
        convergence_figures(table.drop(columns="settings"))
