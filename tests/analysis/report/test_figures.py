"""A figure is described once: a file and a page draw the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

from analysis.findings.results import FitDocument
from analysis.points.table import CheckedPoints
from analysis.report import curves, figures
from analysis.report.convergence import convergence_figures
from analysis.report.figures import fit_figures
from analysis.report.interactive import plotly
from analysis.report.static import draw
from tests.analysis.report.test_convergence import evaluations


def test_both_renderers_draw_every_series_and_point_of_a_description(
    points: CheckedPoints, document: FitDocument
) -> None:
    shown = fit_figures(points, document) + convergence_figures(evaluations(("fd_clap-5e", "ce")))
    assert len({figure.name for figure in shown}) == 7
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
        traces = [trace for trace in plotly(figure, {})["data"] if "fill" not in trace]
        assert len(traces) == len(series) + len(arrows)
        described = [*(one.x for one in series), *(arrow.x for arrow in arrows)]
        assert sum(len(trace["x"]) for trace in traces) == sum(map(len, described))


def test_of_very_many_points_a_figure_draws_some_and_says_so(
    points: CheckedPoints, document: FitDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "DRAWN", 5)
    monkeypatch.setattr(figures, "DRAWN", 5)
    (residuals,) = [figure for figure in fit_figures(points, document) if figure.name == "residuals"]
    assert residuals.caption.endswith(
        "At most 5 points of a kind are drawn, evenly spaced among them; the fit used all."
    )
    for panel in residuals.panels:
        assert sum(len(one.run_ids) for one in panel.series) == 5


def test_points_of_many_budgets_share_few_series(document: FitDocument, points: CheckedPoints) -> None:
    one = points.frame.iloc[:1]
    rows = [one.assign(tokens=tokens, run_id=f"r{tokens}", iterations=tokens) for tokens in range(1000, 1040)]
    more = replace(points, frame=pd.concat([points.frame, *rows], ignore_index=True))
    (residuals,) = [figure for figure in fit_figures(more, document) if figure.name == "residuals"]
    drawn = [one for one in residuals.panels[0].series if one.run_ids]
    assert len(drawn) <= 9
    assert sum(len(one.run_ids) for one in drawn) == 18 + 40
