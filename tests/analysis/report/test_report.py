"""The report: one page without requests, with all points and with the numbers that were computed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.findings.document import fit_points
from analysis.findings.results import FitDocument
from analysis.points.table import CheckedPoints
from analysis.report.headlines import headlines, main_row
from analysis.report.report import Provenance, write_report
from tests.analysis.conftest import checked
from tests.analysis.synthetic import SIMBA, TRANSFORMER, SyntheticStudy, against

PROVENANCE = Provenance(command="ssmscale report demo --out report", commit="0123abcd")


class Page(HTMLParser):
    """Tables by id, addresses a browser would fetch, and text of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.figures: list[dict[str, Any]] = []
        self._table: list[list[str]] | None = None
        self._json = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a":
            self.links.append(str(found.get("href")))
        elif tag in {"link", "img", "script", "iframe"}:
            self.fetched += [str(found[key]) for key in ("src", "href") if key in found]
        if tag == "table":
            self._table = self.tables.setdefault(str(found.get("id")), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in {"td", "th"} and self._table is not None:
            self._table[-1].append("")
        self._json = tag == "script" and found.get("type") == "application/json"

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if self._json:
            self.figures = json.loads(data)
            self._json = False
        elif self._table and self._table[-1]:
            self._table[-1][-1] += data.strip()


def page_of(points: CheckedPoints, document: FitDocument, out: Path, **options: Any) -> tuple[str, Page]:
    path = write_report(points, document, out, study="demo", provenance=PROVENANCE, **options)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def page_of_table(table: pd.DataFrame, out: Path, law: str = "chinchilla") -> tuple[str, Page]:
    points = checked(table)
    return page_of(points, fit_points(points, law=law, resamples=100), out)


@pytest.fixture(scope="module")
def written(
    points: CheckedPoints, document: FitDocument, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, Page]:
    out = tmp_path_factory.mktemp("report")
    html, page = page_of(points, document, out)
    return out, html, page


def test_the_page_fetches_nothing_and_shows_its_provenance(written: tuple[Path, str, Page]) -> None:
    _, html, page = written
    assert page.fetched == ["data:,"]
    assert "@import" not in html.split("<script", 1)[0]
    assert "url(" not in html.split("<script", 1)[0]
    for text in ("ssmscale report demo --out report", "0123abcd", "numpy"):
        assert text in html


def test_figures_and_the_fit_stand_beside_the_page(
    written: tuple[Path, str, Page], document: FitDocument
) -> None:
    out, _, _ = written
    # So few points leave the intervals of most parameters open.
    names = {"main", "loss_vs_parameters", "loss_vs_budget", "size_ratio", "residuals", "profiles"}
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{name}{suffix}" for name in names for suffix in (".svg", ".png")
    }
    for path in (out / "figures").iterdir():
        head = path.read_bytes()[:8]
        assert head.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    assert json.loads((out / "fit.json").read_text(encoding="utf-8")) == document.model_dump(mode="json")


def test_every_point_and_seed_is_in_the_table_and_under_the_pointer(
    written: tuple[Path, str, Page], points: CheckedPoints
) -> None:
    _, _, page = written
    runs = set(points.frame["run_id"])
    assert {row[0] for row in page.tables["points"][1:]} == runs
    for figure in page.figures:
        if figure["name"] in {"size_ratio", "compute_optimal", "profiles"}:
            continue
        hovered = " ".join(text for trace in figure["data"] for text in trace.get("hovertext", []))
        assert {run for run in runs if f"run {run}<" in hovered} == runs, figure["name"]
        drawn = sum(len(trace["x"]) for trace in figure["data"] if "customdata" in trace)
        assert drawn == len(points.frame)


def test_the_headline_is_the_size_ratio_with_its_interval(
    written: tuple[Path, str, Page], document: FitDocument
) -> None:
    _, html, _ = written
    row = main_row(document, "prefix_simba")
    assert row is not None
    assert row.estimate is not None
    sentence = headlines(document)[0]
    assert f"size ratio {row.estimate:.1f}, 95 % interval [" in sentence
    start = "At 1,600 iterations, Prefix SiMBA reaches the loss of the 3M-parameter Cross Transformer"
    assert sentence.startswith(start)
    assert re.sub(r"\s+", " ", sentence) in html


def test_both_checks_stand_with_their_figures_whatever_they_say(
    points: CheckedPoints, document: FitDocument, tmp_path: Path
) -> None:
    table = points.frame.drop(columns="row")
    largest = (
        (table["n_params"] == 3e6) & (table["architecture"] == "prefix_simba") & (table["iterations"] == 1600)
    )
    table.loc[largest, "loss"] = 4.2
    _, page = page_of_table(table, tmp_path)
    rows = page.tables["checks"][1:]
    assert [row[-1] for row in rows] == ["yes", "yes", "no", "no"]
    for row in rows:
        start, end, difference, sd, ratio = (float(cell) for cell in row[2:7])
        assert difference == pytest.approx(start - end, abs=1e-4)
        assert ratio == pytest.approx(difference / sd, rel=0.02, abs=0.06)
    assert any("4.2000" in row for row in page.tables["points"])


def test_without_an_identified_ratio_the_headline_says_so(tmp_path: Path) -> None:
    html, _ = page_of_table(SyntheticStudy(laws=against(E=3.4)).table(0), tmp_path)
    assert "is not identified from these points: no size of Prefix SiMBA reaches" in html
    assert not (tmp_path / "figures" / "size_ratio.png").exists()


def test_rows_set_aside_are_listed_with_their_reason(tmp_path: Path) -> None:
    table = SyntheticStudy().table(0)
    table.loc[4, "annealed"] = False
    _, page = page_of_table(table, tmp_path)
    ((*_, code, reason),) = page.tables["exclusions"][1:]
    assert code == "unannealed"
    assert "biased upwards" in reason
    assert page.tables["exclusions"][1][1] == table.loc[4, "run_id"]


def test_names_from_a_table_are_text_and_never_markup(tmp_path: Path) -> None:
    names = ("<img src=x onerror=alert(1)>", "b</script><script>alert(2)</script>$x^2$")
    html, page = page_of_table(
        SyntheticStudy(laws={names[0]: TRANSFORMER, names[1]: SIMBA}).table(0), tmp_path
    )
    assert page.fetched == ["data:,"]
    assert "<script>alert" not in html
    assert "<img" not in html.split("<script", 1)[0]
    for figure in page.figures:
        for trace in figure["data"]:
            texts = [*trace.get("hovertext", []), trace.get("name", "")]
            assert not any("<img" in text or "<script" in text for text in texts)


def test_runs_link_to_the_tracker_over_http_only(
    points: CheckedPoints, document: FitDocument, tmp_path: Path
) -> None:
    first, second = points.frame["run_id"][:2]
    links = {first: "http://127.0.0.1:5000/#/experiments/1/runs/a", second: "javascript:alert(1)"}
    html, page = page_of(points, document, tmp_path, mlflow_links=links)
    assert page.links == [links[first]]
    assert "javascript:" not in html.split("<script", 1)[0]


@pytest.mark.parametrize(
    "law", ["size", "data", "learning_curve", "chinchilla_iterations_shared_e", "data_constrained"]
)
def test_every_law_has_its_report(law: str, tmp_path: Path) -> None:
    table = SyntheticStudy().table(0)
    if law == "size":
        table = table[table["iterations"] == 1600]
    if law in {"data", "learning_curve"}:
        table = table[table["n_params"] == 1e6]
    if law == "data_constrained":
        table = table[table["architecture"] == "prefix_simba"].assign(unique_tokens=lambda t: t["tokens"] / 2)
    html, page = page_of_table(table, tmp_path, law)
    assert page.figures
    assert "Fitted laws" in html


@pytest.fixture(scope="module")
def ample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitDocument, Page]:
    """The report of a study that tells every parameter and holds compute equal across sizes."""
    sizes, counts = tuple(1e5 * 2.0**k for k in range(6)), tuple(100 * 2**k for k in range(5))
    points = checked(
        SyntheticStudy(sizes=sizes, iterations=counts, seeds=(2,) * 6, cluster_noise=0.001).table(0)
    )
    document = fit_points(points, resamples=100)
    out = tmp_path_factory.mktemp("ample")
    return out, document, page_of(points, document, out)[1]


def test_predictions_token_gains_and_optimal_sizes_stand_as_computed(
    ample: tuple[Path, FitDocument, Page],
) -> None:
    out, document, page = ample
    assert (out / "figures" / "compute_optimal.svg").exists()
    (figure,) = [figure for figure in page.figures if figure["name"] == "compute_optimal"]
    lines = [trace["y"] for trace in figure["data"] if trace["mode"] == "lines"]
    assert lines == [[one.parametric for one in found.optima] for found in document.isoflop.values()]
    predicted = [one for fit in document.architectures.values() for one in fit.predictions]
    assert [row[3] for row in page.tables["predictions"][1:]] == [f"{one.loss:.4f}" for one in predicted]
    gains = document.comparison.token_gain
    assert [row[3] for row in page.tables["token-gain"][1:]] == [f"{row.loss:.4f}" for row in gains]
    exponents = [found.exponents["parametric"].value for found in document.isoflop.values()]
    assert [row[1] for row in page.tables["compute-optimal"][1:]] == [f"{value:.3f}" for value in exponents]
    assert len(page.tables["conventions"]) == 1 + len(document.comparison.conventions) > 1


def test_a_profile_is_drawn_where_it_is_flat_and_not_where_it_closes(
    ample: tuple[Path, FitDocument, Page], tmp_path: Path
) -> None:
    out, _, closed = ample
    assert not any(figure["name"] == "profiles" for figure in closed.figures)
    assert not (out / "figures" / "profiles.png").exists()
    points = checked(SyntheticStudy(sizes=(1e5, 3e5), seeds=(3, 3)).table(0))
    document = fit_points(points, resamples=100)
    _, page = page_of(points, document, tmp_path)
    (figure,) = [figure for figure in page.figures if figure["name"] == "profiles"]
    fit = document.architectures["prefix_simba"]
    flat = [name for name, curve in fit.profile.items() if None in curve.interval]
    assert flat
    drawn = [trace["x"] for trace in figure["data"] if trace["mode"] == "lines"]
    assert all(list(fit.profile[name].values) in drawn for name in flat)
    assert (tmp_path / "figures" / "profiles.svg").exists()
