"""The report in a real browser: it opens from disk, draws every figure, and leaves the console empty."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from analysis.findings.document import fit_points
from analysis.report.report import Provenance, write_report
from tests.analysis.conftest import checked
from tests.analysis.report.test_convergence import evaluations
from tests.analysis.synthetic import SyntheticStudy
from tests.waiting import PATIENCE

pytestmark = pytest.mark.cluster

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # which is small in a container
    "--disable-background-networking",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
    "--window-size=1200,6000",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes, counts = tuple(1e5 * 2.0**k for k in range(5)), (200, 400, 800, 1600, 3200)
    study = SyntheticStudy(sizes=sizes, iterations=counts, seeds=(1,) * 5, cluster_noise=0.025)
    points = checked(study.table(1))  # one profile stays open, and the ratios are identified
    document = fit_points(points, resamples=100)
    out = tmp_path_factory.mktemp("report")
    return write_report(
        points,
        document,
        out,
        study="demo",
        provenance=Provenance(command="test"),
        evaluations=evaluations(("fd_clap-5e", "ce")),
    )


def browse(chromium: str, page: Path, profile: Path) -> tuple[str, list[str]]:
    """Return the page's elements after its scripts have run, and the lines of its console."""
    ended = subprocess.run(
        [chromium, *OPTIONS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


def test_every_figure_is_drawn_and_the_console_stays_empty(
    chromium: str, report: Path, tmp_path: Path
) -> None:
    dom, console = browse(chromium, report, tmp_path)
    assert console == []
    names = re.findall(r'id="figure-(\w+)"', dom)
    drawn = [
        "main",
        "loss_vs_parameters",
        "loss_vs_budget",
        "size_ratio",
        "compute_optimal",
        "residuals",
        "residuals_vs_budget",
        "residuals_vs_compute",
        "profiles",
        "convergence_fd_clap_5e_0a1b2c",
        "convergence_ce_held_out",
    ]
    assert names == drawn
    assert dom.count('data-drawn="yes"') == len(names)
    parts = re.split(r'id="figure-\w+"', dom)[1:]
    for name, part in zip(names, parts, strict=True):
        assert 'class="main-svg"' in part, name
        points = len(re.findall(r'class="point\b', part))
        few = {"size_ratio": 3, "compute_optimal": 3, "profiles": 2}
        few |= {
            "convergence_fd_clap_5e_0a1b2c": 12 + 17,
            "convergence_ce_held_out": 12,
        }  # ours, and the published
        assert points >= few.get(name, 40), name


def test_a_broken_script_would_be_seen(chromium: str, report: Path, tmp_path: Path) -> None:
    """The test above can fail: without the figures' data the page writes to the console and draws nothing."""
    broken = tmp_path / "broken.html"
    html = report.read_text(encoding="utf-8")
    broken.write_text(html.replace('id="figures"', 'id="gone"'), encoding="utf-8")
    dom, console = browse(chromium, broken, tmp_path / "profile")
    assert console
    assert 'data-drawn="yes"' not in dom


def test_a_script_that_is_not_the_pages_own_does_not_run(chromium: str, report: Path, tmp_path: Path) -> None:
    planted = tmp_path / "planted.html"
    script = "<script>document.body.dataset.planted = 'yes'</script></main>"
    planted.write_text(report.read_text(encoding="utf-8").replace("</main>", script), encoding="utf-8")
    dom, console = browse(chromium, planted, tmp_path / "profile")
    assert "Content Security Policy" in "".join(console)
    assert 'data-planted="yes"' not in dom
    assert 'data-drawn="yes"' in dom
