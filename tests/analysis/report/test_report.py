"""The report: one page without requests, with all points and with the numbers that were computed."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from analysis.findings.document import drop_outliers, fit_points
from analysis.findings.results import FitDocument
from analysis.points.table import CheckedPoints
from analysis.report.figures import fit_figures
from analysis.report.headlines import headlines, main_row
from analysis.report.report import Provenance, write_report
from analysis.report.static import draw
from analysis.report.tables import print_fit
from tests.analysis.conftest import checked
from tests.analysis.report.test_convergence import evaluations
from tests.analysis.synthetic import SIMBA, TRANSFORMER, SyntheticStudy, against
from tests.programs import peak_mib

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


def traces(figure: dict[str, Any]) -> list[dict[str, Any]]:
    """All traces of a figure of a page."""
    return [trace for panel in figure["panels"] for trace in panel["data"]]


Html = tuple[str, Page]
Written = tuple[Path, str, Page]
Ample = tuple[CheckedPoints, FitDocument, str, Page]


def page_of(
    points: CheckedPoints, document: FitDocument, out: Path, *, drawn: bool = False, **options: Any
) -> Html:
    """Write a report, with files of its figures only where they are `drawn`: these take most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr("analysis.report.report.save_figures", lambda figures, folder: None)
        path = write_report(points, document, out, study="demo", provenance=PROVENANCE, **options)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def written(
    points: CheckedPoints, document: FitDocument, tmp_path_factory: pytest.TempPathFactory
) -> Written:
    out = tmp_path_factory.mktemp("report")
    return out, *page_of(points, document, out, drawn=True, evaluations=evaluations(("fd_clap-5e", "ce_0")))


NAMES = ("<img src=x onerror=alert(1)>", "b</script><script>alert(2)</script>$x^2$[/b]")
LINKS = ("http://127.0.0.1:5000/#/experiments/1/runs/a", "javascript:alert(1)")
ASIDE, WORSE = f"{NAMES[0]}-100000-1-800", f"{NAMES[1]}-3000000-0-1600"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Html:
    """A report of names that are markup, with a row set aside, a large model that is worse, and links of two kinds."""
    table = SyntheticStudy(laws={NAMES[0]: TRANSFORMER, NAMES[1]: SIMBA}).table(0)
    table["annealed"] = table["run_id"] != ASIDE
    table["loss"] = table["loss"].where(table["run_id"] != WORSE, 4.2)
    points = checked(table)
    scores = evaluations(("fd_<img src=x>",), architecture="a</script><script>alert(1)</script>")
    links = dict(zip(points.frame["run_id"], LINKS, strict=False))
    document = fit_points(points, resamples=100)
    out = tmp_path_factory.mktemp("odd")
    said = io.StringIO()
    print_fit(Console(file=said, width=200, markup=False), points, document)
    assert NAMES[1] in said.getvalue()  # in the terminal too, where [/b] would end a style
    return page_of(points, document, out, drawn=True, evaluations=scores, mlflow_links=links)


def test_the_page_fetches_nothing_and_shows_its_provenance(written: Written) -> None:
    _, html, page = written
    assert page.fetched == ["data:,"]
    assert "@import" not in html.split("<script", 1)[0]
    assert "url(" not in html.split("<script", 1)[0]
    for text in ("ssmscale report demo --out report", "0123abcd", "numpy"):
        assert text in html


def test_figures_and_the_fit_stand_beside_the_page(written: Written, document: FitDocument) -> None:
    out, _, _ = written
    # So few points leave the intervals of most parameters open.
    names = {
        "main",
        "loss_vs_parameters",
        "loss_vs_budget",
        "size_ratio",
        "residuals",
        "residuals_vs_budget",
        "residuals_vs_compute",
        "convergence",
    }
    assert {path.name for path in (out / "figures").iterdir()} == {
        f"{name}{suffix}" for name in names for suffix in (".svg", ".png")
    }
    for path in (out / "figures").iterdir():
        head = path.read_bytes()[:8]
        assert head.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    assert json.loads((out / "fit.json").read_text(encoding="utf-8")) == document.model_dump(mode="json")


def test_every_point_and_seed_is_in_the_table_and_under_the_pointer(
    written: Written, points: CheckedPoints
) -> None:
    _, _, page = written
    runs = set(points.frame["run_id"])
    assert {row[0] for row in page.tables["points"][1:]} == runs
    for figure in page.figures:
        if figure["name"] not in {"main", "loss_vs_parameters", "loss_vs_budget"} and not (
            figure["name"].startswith("residuals")
        ):
            continue
        hovered = " ".join(text for trace in traces(figure) for text in trace.get("hovertext", []))
        assert {run for run in runs if f"run {run}<" in hovered} == runs, figure["name"]
        drawn = sum(len(trace["x"]) for trace in traces(figure) if "customdata" in trace)
        assert drawn == len(points.frame)


def test_the_headline_is_the_size_ratio_with_its_interval(written: Written, document: FitDocument) -> None:
    _, html, _ = written
    row = main_row(document, "prefix_simba")
    assert row is not None
    assert row.estimate is not None
    sentence = headlines(document)[0]
    assert f"size ratio {row.estimate:.1f}, 95 % interval [" in sentence
    start = "At 1,600 iterations, Prefix SiMBA reaches the loss of the 3M-parameter Cross Transformer"
    assert sentence.startswith(start)
    assert re.sub(r"\s+", " ", sentence) in html


def test_both_checks_stand_with_their_figures_whatever_they_say(odd: Html) -> None:
    _, page = odd
    rows = page.tables["checks"][1:]
    assert [row[-1] for row in rows] == ["yes", "yes", "no", "no"]
    for row in rows:
        start, end, difference, sd, ratio = (float(cell) for cell in row[2:7])
        assert difference == pytest.approx(start - end, abs=1e-4)
        assert ratio == pytest.approx(difference / sd, rel=0.02, abs=0.06)
    assert any("4.2000" in row for row in page.tables["points"])


def test_without_an_identified_ratio_the_headline_says_so() -> None:
    points = checked(SyntheticStudy(laws=against(E=3.4)).table(0))
    document = fit_points(points, resamples=100)
    (sentence,) = headlines(document)
    assert "is not identified from these points: no size of Prefix SiMBA reaches" in sentence
    assert "size_ratio" not in {figure.name for figure in fit_figures(points, document)}


def test_rows_set_aside_are_listed_with_their_reason(odd: Html) -> None:
    ((_, _, run_id, *_, code, reason),) = odd[1].tables["exclusions"][1:]
    assert (run_id, code) == (ASIDE, "unannealed")
    assert "biased upwards" in reason


def test_names_from_tables_are_text_and_never_markup(odd: Html) -> None:
    html, page = odd
    assert page.fetched == ["data:,"]
    assert "<script>alert" not in html
    assert "<img" not in html.split("<script", 1)[0]
    for figure in page.figures:
        for trace in traces(figure):
            texts = [*trace.get("hovertext", []), trace.get("name", "")]
            assert not [text for text in texts if "<img" in text or "<script" in text], figure["name"]


def test_runs_link_to_the_tracker_over_http_only(odd: Html) -> None:
    html, page = odd
    assert page.links == [LINKS[0]]
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
    points = checked(table)
    document = fit_points(points, law=law, resamples=100)
    html, page = page_of(points, document, tmp_path)
    assert len(page.figures) == len([draw(figure) for figure in fit_figures(points, document)]) > 0
    assert "Fitted laws" in html


def test_scores_have_their_section_and_studies_without_scores_have_none(
    written: Written, ample: Ample
) -> None:
    out, html, page = written
    values = evaluations(("fd_clap-5e", "ce_0"))["value"]
    assert [row[6] for row in page.tables["evaluations"][1:]] == [f"{value:.4g}" for value in values]
    assert "convergence_fd_clap_5e_0a1b2c" in {figure["name"] for figure in page.figures}
    assert (out / "figures" / "convergence.svg").exists()
    assert 'id="convergence"' in html
    assert "Convergence" not in ample[2].split("<script", 1)[0]


@pytest.fixture(scope="module")
def ample(tmp_path_factory: pytest.TempPathFactory) -> Ample:
    """The report of a study that tells every parameter and holds compute equal across sizes, without scores."""
    sizes, counts = tuple(1e5 * 2.0**k for k in range(6)), tuple(100 * 2**k for k in range(5))
    study = SyntheticStudy(sizes=sizes, iterations=counts, seeds=(2,) * 6, cluster_noise=0.001)
    points = checked(study.table(0))
    document = fit_points(points, resamples=100)
    none = evaluations(())
    return points, document, *page_of(points, document, tmp_path_factory.mktemp("ample"), evaluations=none)


def test_predictions_token_gains_and_optimal_sizes_stand_as_computed(ample: Ample) -> None:
    _, document, _, page = ample
    (figure,) = [figure for figure in page.figures if figure["name"] == "compute_optimal"]
    lines = [trace["y"] for trace in traces(figure) if trace["mode"] == "lines"]
    assert lines == [[one.parametric for one in found.optima] for found in document.isoflop.values()]
    predicted = [one for fit in document.architectures.values() for one in fit.predictions]
    assert [row[3] for row in page.tables["predictions"][1:]] == [f"{one.loss:.4f}" for one in predicted]
    gains = document.comparison.token_gain
    assert [row[3] for row in page.tables["token-gain"][1:]] == [f"{row.loss:.4f}" for row in gains]
    exponents = [found.exponents["parametric"].value for found in document.isoflop.values()]
    assert [row[1] for row in page.tables["compute-optimal"][1:]] == [f"{value:.3f}" for value in exponents]
    assert len(page.tables["conventions"]) == 1 + len(document.comparison.conventions) > 1


def test_a_profile_is_drawn_where_it_is_flat_and_not_where_it_closes(ample: Ample) -> None:
    assert "profiles" not in {figure.name for figure in fit_figures(*ample[:2])}
    points = checked(SyntheticStudy(sizes=(1e5, 3e5), seeds=(3, 3)).table(0))
    document = fit_points(points, resamples=100)
    (figure,) = [figure for figure in fit_figures(points, document) if figure.name == "profiles"]
    fit = document.architectures["prefix_simba"]
    flat = [name for name, curve in fit.profile.items() if None in curve.interval]
    assert flat
    drawn = [one.x for panel in figure.panels for one in panel.series if one.dash == "solid"]
    assert all(fit.profile[name].values in drawn for name in flat)


def text_of(html: str) -> str:
    """Text of a page before its scripts, with single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.split("<script", 1)[0]))


def test_the_page_speaks_of_seeds_only_where_there_are_some(ample: Ample, tmp_path: Path) -> None:
    assert "standard deviation (s.d.) between seeds" in text_of(ample[2])
    assert "paired by size rung and seed" in text_of(ample[2])
    table = SyntheticStudy(seeds=(1,) * 4).table(0).drop(columns="seed")
    points = checked(table)
    html, page = page_of(points, fit_points(points, resamples=100), tmp_path)
    text = text_of(html).partition(" Notes ")[0]  # which recommend seeds
    assert "the noise, which is unknown: no configuration was trained more than once" in text
    assert "seeds" not in page.tables
    for said in ("between seeds", "Seeds of", "several seeds", "and seeds", "rung and seed", "averaged"):
        assert said not in text


def test_repeated_runs_without_a_seed_are_not_called_seeds(tmp_path: Path) -> None:
    points = checked(SyntheticStudy().table(0).drop(columns="seed"))
    html, _ = page_of(points, fit_points(points, resamples=100), tmp_path)
    assert "standard deviation (s.d.) between repeated runs" in text_of(html)
    assert "between seeds" not in text_of(html)


def test_the_page_says_whether_outliers_were_dropped(written: Written, tmp_path: Path) -> None:
    assert "No point was excluded for being far off the law" in text_of(written[1])
    table = SyntheticStudy().table(0)
    table.loc[3, "loss"] *= 3
    points = drop_outliers(checked(table))
    html, _ = page_of(points, fit_points(points, resamples=100), tmp_path)
    assert "1 point was excluded for being far off the law" in text_of(html)
    assert "No point was excluded" not in text_of(html)


@pytest.mark.verify
def test_a_hundred_thousand_points_are_reported_in_bounded_memory(tmp_path: Path) -> None:
    study = SyntheticStudy(
        sizes=tuple(np.geomspace(1e5, 1e7, 10)), iterations=range(50, 50_050, 50), seeds=(5,) * 10
    )
    study.table(0).to_csv(tmp_path / "p.csv", index=False)
    assert peak_mib("report", "--points", tmp_path / "p.csv", "--out", tmp_path / "report") < 1024
    (note,) = json.loads((tmp_path / "report/fit.json").read_text())["notes"][:1]
    assert note["text"] == "100,000 points are many: 200 resamples were made in place of 1000."
    page = (tmp_path / "report/report.html").read_text()
    assert "100000 points in the fits, of which the table lists 2000" in page
    assert len(page) < 40e6
