"""The report: one HTML page that opens from disk, the figures as files and the fit as JSON.

The page is self-contained, with Plotly's script: it needs no network and no server. It shows all seeds and points, and
lists the rows that were set aside with their reasons.
"""

from __future__ import annotations

import json
import platform
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import text as wording
from analysis.findings.curve import spaced
from analysis.findings.document import installed
from analysis.points.sweeps import differing_settings
from analysis.report.convergence import convergence_figures, together
from analysis.report.figures import fit_figures
from analysis.report.first_page import first_page
from analysis.report.interactive import mark, plotly, swatch
from analysis.report.static import save_figures
from analysis.report.style import look

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

    from analysis.findings.results import FitDocument
    from analysis.points.table import CheckedPoints
    from analysis.report.description import Marker

LISTED = 2000
"""Most rows of a table of the page."""
PACKAGES = ("ssmscale", "numpy", "pandas", "matplotlib", "plotly", "torch", "deepspeed", "mlflow")


def installed_versions() -> dict[str, str]:
    """Return the version of Python, and of those PACKAGES that are installed."""
    found = {name: version for name in PACKAGES if (version := installed(name))}
    return {"python": platform.python_version(), **found}


@dataclass(frozen=True)
class Provenance:
    """Origin of a report: the command line, the versions, the commit."""

    command: str
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=installed_versions)
    created: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))


def write_report(
    points: CheckedPoints,
    document: FitDocument,
    out: Path,
    *,
    study: str | None,
    provenance: Provenance,
    evaluations: pd.DataFrame | None = None,
    mlflow_links: Mapping[str, str] | None = None,
) -> Path:
    """Write report.html, figures/*.svg and *.png and fit.json into `out`; return the page's path.

    `evaluations` are scores of generated music, in the columns of analysis.report.convergence; they add a section.
    `mlflow_links` maps run ids to web addresses; addresses of other kinds are ignored.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    links = {run: url for run, url in (mlflow_links or {}).items() if url.startswith(("http://", "https://"))}
    figures = fit_figures(points, document)
    convergence = (
        []
        if evaluations is None or evaluations.empty
        else convergence_figures(evaluations, list(document.architectures))
    )
    save_figures([*figures, *([together(convergence)] if convergence else [])], out / "figures")
    result = document.model_dump(mode="json")
    (out / "fit.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    drawn = [plotly(figure, links) for figure in (*figures, *convergence)]
    payload = json.dumps(drawn, allow_nan=False, separators=(",", ":"))
    rows = points.frame.sort_values(["architecture", "n_params", "seed", "tokens"], kind="stable")
    environment = Environment(
        loader=PackageLoader("analysis.report"),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = ("human", "number", "times", "between", "percent")
    environment.filters |= {name: getattr(wording, name) for name in written}
    environment.filters |= {"few": _few}
    environment.filters |= {"arm": wording.architecture, "powers": _powers, "digest": _digest}
    page = environment.get_template("report.html").render(
        study=study,
        document=document,
        first=first_page(document, points),
        seeds=any(fit.seed_noise for fit in document.architectures.values()),
        repeats="seeds" if points.frame["seed"].notna().any() else "repeated runs",
        outliers=sum(one.code == "outlier" for one in points.exclusions),
        figures=figures,
        convergence=convergence,
        evaluations=[] if evaluations is None else evaluations.to_dict("records"),
        payload=payload.replace("<", "\\u003c"),  # which could end the script element
        plotly=get_plotlyjs(),
        links=links,
        points=rows.iloc[spaced(len(rows), LISTED)].to_dict("records"),
        n_points=len(rows),
        listed=LISTED,
        exclusions=points.exclusions,
        settings=differing_settings(points.frame),
        provenance=provenance,
        budget=wording.budget,
        swatch=lambda entry: Markup(swatch(entry)),  # noqa: S704 - numbers and colours of our own
        mark=lambda name: _mark(*look(name, list(document.architectures))),
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _few(rows: Sequence[Any]) -> list[Any]:
    """Return the rows that a table lists: all, or evenly spaced ones of very many."""
    return [rows[place] for place in spaced(len(rows), LISTED)]


def _mark(colour: str, marker: Marker) -> Markup:
    """Return the mark of an architecture for a table."""
    from markupsafe import Markup

    return Markup(mark(marker, colour, colour, 6))  # noqa: S704 - numbers and colours of our own


def _digest(script: str) -> str:
    """Return the source with which a Content-Security-Policy allows this script."""
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


def _powers(formula: str) -> Markup:
    """Write the exponents of a formula as superscripts."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"\^(\w+)", r"<sup>\1</sup>", str(escape(formula))))  # noqa: S704 - escaped just before
