"""The page of a report at every width, and its files: no texts overlap, none is cut, no page scrolls sideways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from analysis.findings.document import fit_points
from analysis.findings.results import FitDocument
from analysis.points.table import CheckedPoints
from analysis.report.convergence import convergence_figures, together
from analysis.report.description import Figure
from analysis.report.figures import fit_figures
from analysis.report.report import Provenance, write_report
from analysis.report.static import RC, draw
from tests.analysis.conftest import checked
from tests.analysis.report.test_convergence import evaluations
from tests.analysis.synthetic import NAMES, of_many
from tests.cluster.browser import Browser

WIDTHS = (400, 700, 1000, 1600)
DRAWN = "document.querySelectorAll('.figure').length === document.querySelectorAll('[data-drawn=yes]').length"
SETTLED = "new Promise(done => setTimeout(() => requestAnimationFrame(() => done(true)), 200))"
# Returns what is wrong with the boxes of texts, a line each.
FAULTS = r"""
(() => {
  const wrong = [];
  const wide = document.documentElement;
  if (wide.scrollWidth > innerWidth) { wrong.push(`the page is ${wide.scrollWidth} wide`); }
  const box = (element) => {
    const r = element.getBoundingClientRect();
    return {left: r.left, right: r.right, top: r.top, bottom: r.bottom, text: element.textContent.trim().slice(0, 40)};
  };
  const seen = (element) => {
    const r = element.getBoundingClientRect();
    const hidden = getComputedStyle(element).visibility === "hidden";
    return r.width > 0 && r.height > 0 && element.textContent.trim() && !hidden;
  };
  for (const element of document.querySelectorAll("h1, h2, h3, h4, p, li, dt, dd, .legend button")) {
    if (seen(element) && !element.closest(".scroll")) {
      const at = box(element);
      if (at.left < 0 || at.right > innerWidth + 0.5) { wrong.push(`cut by the page: ${at.text}`); }
      if (element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display !== "inline") {
        wrong.push(`wider than its box: ${at.text}`);
      }
    }
  }
  for (const card of document.querySelectorAll(".card")) {
    const texts = [];
    for (const element of card.querySelectorAll("h3, h4, .caption, .legend button")) {
      if (seen(element)) { texts.push(box(element)); }
    }
    for (const plot of card.querySelectorAll(".plot")) {
      const frame = plot.querySelector(".main-svg").getBoundingClientRect();
      for (const element of plot.querySelectorAll(".main-svg text")) {
        if (!seen(element) || element.closest(".hoverlayer")) { continue; }
        const at = box(element);
        texts.push(at);
        const aside = Math.max(frame.left - at.left, at.right - frame.right);
        const over = Math.max(aside, frame.top - at.top, at.bottom - frame.bottom);
        if (over > 1) { wrong.push(`cut by its figure: ${at.text}`); }
      }
      for (const axis of ["xtick", "ytick"]) {
        const ticks = plot.querySelectorAll(`.${axis} text`).length;
        if (ticks < 2) { wrong.push(`${plot.closest(".figure").id}: ${ticks} ${axis}s`); }
      }
    }
    texts.forEach((one, i) => texts.slice(0, i).forEach((other) => {
      const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
      if (across > 1 && down > 2) { wrong.push(`${one.text} on ${other.text}`); }
    }));
  }
  return wrong;
})()
"""


@cache
def fitted(count: int, law: str = "chinchilla", **shape: Any) -> tuple[CheckedPoints, FitDocument]:
    """Fit a study of so many architectures."""
    points = checked(of_many(count, **shape).table(2))
    return points, fit_points(points, law=law, resamples=100)


def write_page(out: Path, fit: tuple[CheckedPoints, FitDocument], **options: Any) -> Path:
    """Write a report without files of its figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.report.report.save_figures", lambda figures, folder: None)
        return write_report(*fit, out, study=None, provenance=Provenance(command="t"), **options)


def faults_of_file(figure: Figure) -> list[str]:
    """Return the texts of a drawn figure that lie on another or outside."""
    with mpl.rc_context(RC):
        drawn = draw(figure)
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
        renderer = canvas.get_renderer()
        spare = spare_texts(drawn)
        boxes = [
            (f"{figure.name}: {text.get_text()}", text.get_window_extent(renderer))
            for text in drawn.findobj(Text)
            if text.get_visible() and text.get_text().strip() and text not in spare
        ]
    wrong = []
    for name, box in boxes:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > drawn.bbox.x1 + 1 or box.y1 > drawn.bbox.y1 + 1:
            wrong.append(f"cut: {name}")
    for (name, one), (other, two) in combinations(boxes, 2):
        across, down = min(one.x1, two.x1) - max(one.x0, two.x0), min(one.y1, two.y1) - max(one.y0, two.y0)
        if across > 1 and down > 3:
            wrong.append(f"{name} on {other}")
    return wrong


def spare_texts(drawn: matplotlib.figure.Figure) -> set[Text]:
    """Return texts of ticks that matplotlib keeps and does not draw."""
    spare = set()
    for axes in drawn.axes:
        for axis in (axes.xaxis, axes.yaxis):
            used = axis._update_ticks() if axes.get_visible() and axis.get_visible() else []
            for tick in (*axis.majorTicks, *axis.minorTicks):
                if tick not in used:
                    spare |= {tick.label1, tick.label2}
    return spare


@pytest.fixture(scope="module")
def browser(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(chromium, tmp_path_factory.mktemp("profile")) as page:
        yield page


def faults(browser: Browser, page: Path, widths: Sequence[int]) -> dict[int, list[str]]:
    """Open a page at the first width, and resize it to the others; return what is wrong at each width."""
    browser.resize(widths[0], 1000)
    browser.open(page.as_uri())
    browser.wait_until(f"document.readyState === 'complete' && {DRAWN}")
    found = {}
    for width in widths:
        browser.resize(width, 1000)
        browser.value(SETTLED)
        found[width] = browser.value(FAULTS)
    return found


@pytest.mark.cluster
@pytest.mark.parametrize("count", [2, 12])
def test_nothing_overlaps_or_is_cut_on_a_narrow_and_on_a_wide_page(
    count: int, browser: Browser, tmp_path: Path
) -> None:
    page = write_page(
        tmp_path, fitted(count), evaluations=evaluations(("fd_clap-5e",)) if count == 2 else None
    )
    assert faults(browser, page, (1000, 400)) == {1000: [], 400: []}
    assert browser.exceptions == []


@pytest.mark.cluster
def test_an_entry_of_the_legend_hides_and_shows_its_group(browser: Browser, tmp_path: Path) -> None:
    page = write_page(tmp_path, fitted(2))
    faults(browser, page, (1000,))
    count = "document.querySelectorAll('#figure-main .point').length"
    button = "document.querySelector('#figure-main .legend button')"
    before = browser.value(count)
    for shown in (f"< {before}", f"=== {before}"):
        browser.value(f"{button}.click()")
        browser.wait_until(f"{count} {shown}")


@pytest.mark.cluster
def test_points_without_texts_are_drawn_as_an_image_for_each_entry(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.report.curves.TOLD", 12)
    page = write_page(tmp_path, fitted(2))
    faults(browser, page, (1000,))
    assert browser.value("document.querySelectorAll('#figure-main image').length") == 2


@pytest.mark.cluster
def test_the_checker_sees_an_overlap_and_a_cut(browser: Browser, tmp_path: Path) -> None:
    """The tests above can fail."""
    page = write_page(tmp_path, fitted(2))
    html = page.read_text(encoding="utf-8")
    page.write_text(html.replace(".panel h4 {", ".panel h4 { height: 0; width: 2000px;"), encoding="utf-8")
    (found,) = faults(browser, page, (700,)).values()
    assert any(line.startswith("the page is") for line in found)
    page.write_text(html.replace(".legend {", ".legend { margin-top: -40px !important;"), encoding="utf-8")
    (found,) = faults(browser, page, (700,)).values()
    assert any(" on " in line for line in found)


@pytest.mark.cluster
@pytest.mark.verify
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize("kind", ["few", "some", "many", "budgets"])
def test_nothing_overlaps_or_is_cut_at_any_width(
    count: int, kind: str, browser: Browser, tmp_path: Path
) -> None:
    """Of 3, 20 and 400 points an architecture, and of 40 budgets."""
    law, shape = {
        "few": ("size", {"sizes": (1e5, 2.1e7, 3e9), "iterations": (700,)}),
        "some": ("chinchilla", {}),
        "many": (
            "chinchilla",
            {
                "sizes": tuple(1e5 * 1.9**k for k in range(10)),
                "iterations": range(500, 10500, 500),
                "seeds": (2,) * 10,
            },
        ),
        "budgets": ("chinchilla", {"iterations": tuple(round(100 * 1.12**k) for k in range(40))}),
    }[kind]
    page = write_page(tmp_path, fitted(count, law, **shape))
    assert faults(browser, page, WIDTHS) == {width: [] for width in WIDTHS}
    assert len(NAMES) >= count


@pytest.mark.parametrize("count", [2, 12])
def test_texts_of_files_neither_overlap_nor_are_cut(count: int) -> None:
    figures = fit_figures(*fitted(count))
    if count == 2:
        figures.append(together(convergence_figures(evaluations(("fd_clap-5e", "ce")))))
    assert [fault for figure in figures for fault in faults_of_file(figure)] == []


@pytest.mark.verify
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_texts_of_files_fit_with_any_number_of_architectures(count: int) -> None:
    for shape in ({}, {"iterations": tuple(round(100 * 1.12**k) for k in range(40))}, {"seeds": (3,) * 5}):
        figures = fit_figures(*fitted(count, **shape))
        assert [fault for figure in figures for fault in faults_of_file(figure)] == []
