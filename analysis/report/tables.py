"""How a fit looks in a terminal: the law of each architecture, the size ratios, and every note.

How an expected study looks in a terminal: each parameter's interval, the size ratio's, and every note.

How the next step looks in a terminal, and how former ones turned out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.design.budget import Proposal
from analysis.design.expect import DesignDocument
from analysis.design.grid import Space
from analysis.design.scale_up import ScaleUp, Seen
from analysis.findings.equal_loss import SizeRatio, TokenGain
from analysis.findings.note import Note
from analysis.findings.results import FitDocument
from analysis.points.table import CheckedPoints
from analysis.text import budget, human, percent


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
        f"points: {document.points}"
    )
    if points.exclusions:
        kinds = Counter(exclusion.code for exclusion in points.exclusions)
        console.print("set aside: " + ", ".join(f"{count} {code}" for code, count in kinds.items()))
    notes: list[tuple[str, Note]] = [("", note) for note in document.notes]
    notes += [
        (f" ({name})", note) for name, fitted in document.architectures.items() for note in fitted.notes
    ]
    for about, note in notes:
        console.print(f"note {note.code}{about}: {note.text}")


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
    table.add_row(*map(Text, cells))


def titled(title: str, columns: tuple[str, ...]) -> Table:
    """An empty table; names and verdicts stand left, numbers right."""
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            name, justify="left" if name in {"architecture", "status"} else "right", no_wrap=True
        )
    return table


def print_design(console: Console, design: DesignDocument) -> None:
    """Print what is expected of a grid, and the notes on it."""
    if design.architectures:
        names = list(next(iter(design.architectures.values())))
        table = titled(
            f"expected of {design.law}: the prior and the median 95 % interval of its fits",
            ("architecture", *names),
        )
        for name, parameters in design.architectures.items():
            cells = [f"{one.truth:.4g} [{one.ci95[0]:.3g}, {one.ci95[1]:.3g}]" for one in parameters.values()]
            add(table, name, *cells)
        console.print(table)
    if design.size_ratio:
        table = titled(
            f"expected size ratio against {design.size_ratio[0].reference}: how many times smaller for the same loss",
            ("architecture", "budget", "reference", "ratio", "95 %", "holds it", "identified"),
        )
        for row in design.size_ratio:
            add(
                table,
                row.architecture,
                budget(row.iterations, row.tokens),
                human(row.reference_n_params),
                "-" if row.truth is None else f"{row.truth:.2f}",
                "none" if row.ci95 is None else f"{row.ci95[0]:.2f} to {row.ci95[1]:.2f}",
                "-" if row.coverage is None else f"{row.coverage:.0%}",
                f"{row.identified:.0%}",
            )
        console.print(table)
    if design.studies:
        noise = design.noise
        console.print(
            f"of {design.studies} simulated studies, seed {design.seed}; prior: {design.prior_source}; losses scatter "
            f"by {100 * noise['series']:.2g} % a series and {100 * noise['run']:.2g} % a run"
        )
    for note in design.notes:
        console.print(f"note {note.code}: {note.text}")


def print_proposal(
    console: Console, space: Space, found: Proposal, expected: DesignDocument, written: str
) -> None:
    """Print a proposed grid, what it costs, what is expected of it, and the YAML to paste."""
    cost = found.grid.gpu_hours_of_sizes(space)
    table = titled("proposed grid", ("size", *space.architectures, "seeds", "GPU-hours"))
    for size, seeds, hours in zip(space.sizes, found.grid.seeds, cost, strict=True):
        parameters = {rung.architecture: rung.n_params for rung in space.rungs if rung.size == size}
        cells = [human(parameters[name]) for name in space.architectures]
        add(table, size, *cells, str(seeds), f"{hours:.4g}")
    console.print(table)
    counts = ", ".join(f"{count:,}" for count in found.grid.iterations)
    console.print(f"iterations {counts}; {found.gpu_hours:.4g} GPU-hours left to spend")
    print_design(console, expected)
    console.print("in the study:")
    console.print(written)


def print_scale_up(console: Console, proposed: ScaleUp | None, seen: Sequence[Seen]) -> None:
    """Print what to train next, where it was asked for, and how what was foreseen before turned out."""
    if proposed is not None:
        _print_step(console, proposed)
    if seen:
        _print_seen(console, seen)
    elif proposed is None:
        console.print("nothing has finished yet outside what the proposals were made from")


def _print_step(console: Console, proposed: ScaleUp) -> None:
    table = titled(
        f"next step for {proposed.budget_gpu_hours:g} GPU-hours, by {proposed.law}",
        (
            "architecture",
            "n_params",
            "95 %",
            "iterations",
            "GPU-hours",
            "loss",
            "law 95 %",
            "run 95 %",
            "beyond",
        ),
    )
    for step in proposed.steps:
        add(
            table,
            step.architecture,
            human(step.n_params),
            " to ".join(human(end) for end in step.n_params_ci95),
            f"{step.iterations:,}",
            f"{step.gpu_hours:.3g}",
            f"{step.loss:.4f}",
            *(_ends(ends) for ends in (step.ci95, step.run95)),
            f"{max(step.size_factor, step.budget_factor):.3g}x",
        )
    console.print(table)
    for note in proposed.notes:
        console.print(f"note {note.code}: {note.text}")


def _print_seen(console: Console, seen: Sequence[Seen]) -> None:
    table = titled(
        "predicted and seen: runs outside what the law had been fitted to",
        (
            "architecture",
            "run",
            "n_params",
            "iterations",
            "predicted",
            "run 95 %",
            "seen",
            "inside",
            "error",
            "beyond",
        ),
    )
    for one in seen:
        add(
            table,
            one.architecture,
            one.run_id,
            human(one.n_params),
            f"{one.iterations:,.0f}",
            f"{one.predicted:.4f}",
            _ends(one.run95),
            f"{one.loss:.4f}",
            "-" if one.inside is None else "yes" if one.inside else "no",
            percent(one.relative_error),
            f"{max(one.size_factor, one.budget_factor):.3g}x",
        )
    console.print(table)


def _ends(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"
