"""A figure is described once: a file and a page draw the same, and all points."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.image import imread

from analysis.findings.results import FitDocument
from analysis.points.table import CheckedPoints
from analysis.report import curves
from analysis.report.convergence import convergence_figures
from analysis.report.description import Figure
from analysis.report.figures import fit_figures
from analysis.report.interactive import plotly
from analysis.report.static import draw
from tests.analysis.report.test_convergence import evaluations


def figure_named(name: str, points: CheckedPoints, document: FitDocument) -> Figure:
    (found,) = [figure for figure in fit_figures(points, document) if figure.name == name]
    return found


def test_both_renderers_draw_every_series_and_point_of_a_description(
    points: CheckedPoints, document: FitDocument
) -> None:
    shown = fit_figures(points, document) + convergence_figures(evaluations(("fd_clap-5e", "ce")))
    assert len({figure.name for figure in shown}) == 9
    for figure in shown:
        series = [one for panel in figure.panels for one in panel.series]
        lines = sum(len(one.x) for one in series if one.dash != "none")
        dots = sum(len(one.x) for one in series if one.marker != "none")
        axes = draw(figure).axes
        bars = sum(len(one.ends) for one in series)
        assert sum(np.size(line.get_xdata()) for one in axes for line in one.lines) == lines + 2 * bars
        marked = [found for one in axes for found in one.collections if isinstance(found, PathCollection)]
        assert sum(np.shape(found.get_offsets())[0] for found in marked) == dots
        arrows = [arrow for panel in figure.panels for arrow in panel.arrows]
        panels = plotly(figure, {})["panels"]
        traces = [trace for panel in panels for trace in panel["data"] if "fill" not in trace]
        assert len(traces) == len(series) + len(arrows)
        described = [*(one.x for one in series), *(arrow.x for arrow in arrows)]
        assert sum(len(trace["x"]) for trace in traces) == sum(map(len, described))


def test_of_very_many_points_all_are_drawn_and_some_are_told(
    points: CheckedPoints, document: FitDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that draw the same points under any limit, the rest of them as one image of a page."""
    whole = {figure.name: figure for figure in fit_figures(points, document)}
    monkeypatch.setattr(curves, "TOLD", 12)
    for figure in fit_figures(points, document):
        if figure.name.startswith(("main", "loss", "residuals")):
            assert "All 36 points are drawn" in figure.caption
            for panel, full in zip(figure.panels, whole[figure.name].panels, strict=True):
                dots, all_dots = (
                    sorted(
                        (x, y)
                        for one in own.series
                        if one.marker != "none"
                        for x, y in zip(one.x, one.y, strict=True)
                    )
                    for own in (panel, full)
                )
                assert dots == all_dots
                assert 6 <= sum(len(one.run_ids) for one in panel.series) < 36
                assert any(one.cloud for one in panel.series)


def test_points_without_a_text_are_an_image_at_their_places(
    points: CheckedPoints, document: FitDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "TOLD", 12)
    figure = figure_named("main", points, document)
    (panel,) = figure.panels
    images = plotly(figure, {})["panels"][0]["layout"]["images"]
    name = document.comparison.reference
    (found,) = [image for image in images if image["name"] == name]
    pixels = imread(BytesIO(b64decode(found["source"].partition(",")[2])))[:, :, 3] > 0
    clouds = [one for one in panel.series if one.cloud and one.group == name]
    assert clouds
    for one in clouds:
        for x, y in zip(np.log10(one.x), np.log10(one.y), strict=True):
            row = (found["y"] - y) / found["sizey"] * pixels.shape[0]
            column = (x - found["x"]) / found["sizex"] * pixels.shape[1]
            assert pixels[int(row), int(column)]


def test_budgets_that_differ_by_rounding_share_a_line_a_colour_and_an_entry(
    points: CheckedPoints, document: FitDocument
) -> None:
    rng = np.random.default_rng(0)
    tokens = points.frame["tokens"] * (1 + 0.004 * rng.uniform(-1, 1, len(points.frame)))
    frame = points.frame.assign(iterations=np.nan, tokens=tokens)
    figure = figure_named("loss_vs_parameters", replace(points, frame=frame), document)
    assert len([entry for entry in figure.legend if entry.text.endswith("tokens")]) == 3
    for panel in figure.panels:
        assert len([one for one in panel.series if one.dash == "solid"]) == 3
        assert sum(len(one.run_ids) for one in panel.series) == 18


def test_points_of_many_budgets_share_few_series(document: FitDocument, points: CheckedPoints) -> None:
    one = points.frame.iloc[:1]
    budgets = [round(1000 * 1.05**k) for k in range(40)]
    rows = [one.assign(tokens=tokens, run_id=f"r{tokens}", iterations=tokens) for tokens in budgets]
    more = replace(points, frame=pd.concat([points.frame, *rows], ignore_index=True))
    for name in ("residuals", "loss_vs_parameters"):
        series = [one for one in figure_named(name, more, document).panels[0].series if one.run_ids]
        assert len(series) <= 9
        assert sum(len(one.run_ids) for one in series) == 18 + 40


def test_a_diverged_run_is_a_triangle_at_the_edge_of_the_residuals(
    points: CheckedPoints, document: FitDocument
) -> None:
    frame = points.frame.copy()
    frame.loc[3, "loss"] *= 3
    for name in ("residuals", "residuals_vs_budget", "residuals_vs_compute"):
        figure = figure_named(name, replace(points, frame=frame), document)
        panel = figure.panels[0]
        assert panel.y.limits is not None
        assert panel.y.limits[1] < 20
        (far,) = [one for one in panel.series if one.marker == "triangle-up" and one.run_ids]
        assert far.run_ids == (frame.loc[3, "run_id"],)
        assert panel.y.limits[1] * 0.9 < far.y[0] < panel.y.limits[1]
        assert "+109" in far.hover[0]
        assert "Triangles at the edge" in figure.caption
        assert len(panel.bands) == 1


def test_residuals_are_drawn_against_what_varies(points: CheckedPoints, document: FitDocument) -> None:
    names = [figure.name for figure in fit_figures(points, document)]
    assert [name for name in names if name.startswith("residuals")] == [
        "residuals",
        "residuals_vs_budget",
        "residuals_vs_compute",
    ]
    one = points.frame[points.frame["iterations"] == 1600]
    names = [figure.name for figure in fit_figures(replace(points, frame=one), document)]
    assert "residuals_vs_budget" not in names
