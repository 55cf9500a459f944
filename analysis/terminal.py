"""How a fit looks in a terminal: the law of each architecture, the size ratios, and every note."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.diagnostics import Note
from analysis.points import CheckedPoints
from analysis.results import FitDocument, SizeRatio
from analysis.tokengain import TokenGain
from analysis.wording import budget, human


def print_fit(console: Console, points: CheckedPoints, document: FitDocument) -> None:
    """Print the laws with their 95 % intervals, the size ratios, what was set aside, and the notes."""
    console.print(_laws(points, document))
    if document.comparison.size_ratio:
        console.print(_ratios(document))
    for table in (_token_gains(document), _predictions(document), _optimal(document)):
        if table.row_count:
            console.print(table)
    how = document.resampling
    console.print(
        f"intervals: {how.interval} of {how.resamples:,} resamples, "
        f"{'wild cluster bootstrap' if how.scheme == 'wild' else 'whole series'}, seed {how.seed}; "
        f"points: {document.points}",
        markup=False,
    )
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
    table = titled(
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
        add(
            table, name, str(fitted.n_points), str(clusters), *cells, f"{fitted.objective:.4g}", fitted.status
        )
    return table


def _ratios(document: FitDocument) -> Table:
    table = titled(
        f"size ratio against {document.comparison.reference}: how many times smaller for the same loss",
        ("architecture", "budget", "reference", "loss", "ratio", "95 %", "status"),
    )
    for row in document.comparison.size_ratio:
        add(
            table,
            row.architecture,
            budget(row.iterations, row.tokens),
            human(row.reference_n_params),
            "-" if row.loss is None else f"{row.loss:.4f}",
            *_estimate(row),
        )
    return table


def _estimate(row: SizeRatio | TokenGain) -> tuple[str, str, str]:
    """The last cells of a comparison: what the laws give, its interval, how far it is to be believed."""
    ends = row.estimate_ci95
    return (
        "-" if row.estimate is None else f"{row.estimate:.2f}",
        "-" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}",
        row.status,
    )


def _token_gains(document: FitDocument) -> Table:
    table = titled(
        f"token gain over {document.comparison.reference}: how many times fewer tokens for the same loss and size",
        ("architecture", "reference", "size", "loss", "gain", "95 %", "status"),
    )
    for row in document.comparison.token_gain:
        add(
            table,
            row.architecture,
            budget(row.iterations, row.reference_tokens),
            human(row.reference_n_params),
            f"{row.loss:.4f}",
            *_estimate(row),
        )
    return table


def _predictions(document: FitDocument) -> Table:
    table = titled(
        "predicted loss: of the law, and of one further run",
        ("architecture", "size", "budget", "loss", "95 %", "run 95 %", "beyond"),
    )
    for name, fitted in document.architectures.items():
        for one in fitted.predictions:
            add(
                table,
                name,
                human(one.n_params),
                budget(one.iterations, one.tokens or 0.0),
                f"{one.loss:.4f}",
                *(
                    "-" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"
                    for ends in (one.ci95, one.run95)
                ),
                f"{max(one.size_factor, one.budget_factor):.3g}x",
            )
    return table


def _optimal(document: FitDocument) -> Table:
    table = titled(
        "compute-optimal size: N grows as FLOPs to this power, by method",
        ("architecture", "isoflop", "corrected", "95 %", "envelope", "law", "95 %", "budgets"),
    )
    for name, found in document.isoflop.items():
        if not found.exponents:
            continue
        cells = []
        for method, interval in (
            ("isoflop", False),
            ("corrected", True),
            ("envelope", False),
            ("parametric", True),
        ):
            one = found.exponents.get(method)
            cells.append("-" if one is None else f"{one.value:.3f}")
            if interval:
                ends = one.ci95 if one else None
                cells.append("-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}")
        add(table, name, *cells, str(len(found.optima)))
    return table


def add(table: Table, *cells: str) -> None:
    """Add a row of cells as they are: a foreign table's names may hold what rich reads as markup."""
    table.add_row(*map(escape, cells))


def titled(title: str, columns: tuple[str, ...]) -> Table:
    """An empty table; names and verdicts stand left, numbers right."""
    table = Table(title=escape(title), title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            name, justify="left" if name in {"architecture", "status"} else "right", no_wrap=True
        )
    return table
