"""How a fit looks in a terminal: the law of each architecture, the size ratios, and every note."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from analysis.diagnostics import Note
from analysis.points import CheckedPoints
from analysis.results import FitDocument
from analysis.wording import human


def print_fit(console: Console, points: CheckedPoints, document: FitDocument) -> None:
    """Print the laws with their 95 % intervals, the size ratios, what was set aside, and the notes."""
    console.print(_laws(points, document))
    if document.comparison.size_ratio:
        console.print(_ratios(document))
    if points.exclusions:
        kinds = Counter(exclusion.code for exclusion in points.exclusions)
        console.print("set aside: " + ", ".join(f"{count} {code}" for code, count in kinds.items()))
    notes: list[tuple[str, Note]] = [("", note) for note in document.notes]
    notes += [
        (f" ({name})", note) for name, fitted in document.architectures.items() for note in fitted.notes
    ]
    for about, note in notes:
        console.print(f"note {note.code}{about}: {note.text}", markup=False)


def _laws(points: CheckedPoints, document: FitDocument) -> Table:
    names = list(next(iter(document.architectures.values())).params)
    table = _table(
        f"{document.law}: {document.formula}",
        ("architecture", "points", "series", *names, "objective", "status"),
    )
    for name, fitted in document.architectures.items():
        cells = []
        for key in names:
            interval = fitted.ci95.get(key)
            spread = f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else ""
            cells.append(f"{fitted.params[key]:.4g}{spread}")
        clusters = points.of(name)["cluster"].nunique()
        table.add_row(
            name, str(fitted.n_points), str(clusters), *cells, f"{fitted.objective:.4g}", fitted.status
        )
    return table


def _ratios(document: FitDocument) -> Table:
    table = _table(
        f"size ratio against {document.comparison.reference}: how many times smaller for the same loss",
        ("architecture", "iterations", "reference", "loss", "ratio", "95 %", "status"),
    )
    for row in document.comparison.size_ratio:
        table.add_row(
            row.architecture,
            "-" if row.iterations is None else f"{row.iterations:,.0f}",
            human(row.reference_n_params),
            "-" if row.loss is None else f"{row.loss:.4f}",
            "-" if row.estimate is None else f"{row.estimate:.2f}",
            "-" if row.estimate_ci95 is None else f"{row.estimate_ci95[0]:.2f} to {row.estimate_ci95[1]:.2f}",
            row.status,
        )
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            name, justify="left" if name in {"architecture", "status"} else "right", no_wrap=True
        )
    return table
