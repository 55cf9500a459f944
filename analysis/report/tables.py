"""How a fit, an expected study and the next step look in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

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
    _print_laws(console, points, document)
    reference = document.comparison.reference
    _print_table(
        console,
        f"size ratio against {reference}: how many times smaller for the same loss",
        ("architecture", "budget", "reference", "loss", "ratio", "95 %", "status"),
        (
            (
                row.architecture,
                budget(row.iterations, row.tokens),
                human(row.reference_n_params),
                _number(row.loss, 4),
                *_estimate(row),
            )
            for row in document.comparison.size_ratio
        ),
    )
    _print_table(
        console,
        f"token gain over {reference}: how many times fewer tokens for the same loss and size",
        ("architecture", "reference", "size", "loss", "gain", "95 %", "status"),
        (
            (
                row.architecture,
                budget(row.iterations, row.reference_tokens),
                human(row.reference_n_params),
                _number(row.loss, 4),
                *_estimate(row),
            )
            for row in document.comparison.token_gain
        ),
    )
    _print_table(
        console,
        "predicted loss: of the law, and of one further run",
        ("architecture", "size", "budget", "loss", "95 %", "run 95 %", "beyond"),
        (
            (
                name,
                human(one.n_params),
                budget(one.iterations, one.tokens or 0.0),
                _number(one.loss, 4),
                _interval(one.ci95, 4),
                _interval(one.run95, 4),
                _beyond(one.size_factor, one.budget_factor),
            )
            for name, fitted in document.architectures.items()
            for one in fitted.predictions
        ),
    )
    _print_exponents(console, document)
    how = document.resampling
    console.print(
        f"intervals: {how.interval} of {how.resamples:,} resamples, "
        f"{'wild cluster bootstrap' if how.scheme == 'wild' else 'whole series'}, seed {how.seed}; "
        f"points: {document.points}"
    )
    if points.exclusions:
        kinds = Counter(exclusion.code for exclusion in points.exclusions)
        console.print("set aside: " + ", ".join(f"{count} {code}" for code, count in kinds.items()))
    _print_notes(console, document.notes)
    for name, fitted in document.architectures.items():
        _print_notes(console, fitted.notes, about=f" ({name})")


def print_design(console: Console, design: DesignDocument) -> None:
    """Print what is expected of a grid, and the notes on it."""
    names = list(next(iter(design.architectures.values()), ()))
    _print_table(
        console,
        f"expected of {design.law}: the prior and the median 95 % interval of its fits",
        ("architecture", *names),
        (
            (
                name,
                *(f"{one.truth:.4g} [{one.ci95[0]:.3g}, {one.ci95[1]:.3g}]" for one in parameters.values()),
            )
            for name, parameters in design.architectures.items()
        ),
    )
    if design.size_ratio:
        _print_table(
            console,
            f"expected size ratio against {design.size_ratio[0].reference}: how many times smaller for the same loss",
            ("architecture", "budget", "reference", "ratio", "95 %", "holds it", "identified"),
            (
                (
                    row.architecture,
                    budget(row.iterations, row.tokens),
                    human(row.reference_n_params),
                    _number(row.truth, 2),
                    "none" if row.ci95 is None else _interval(row.ci95, 2),
                    "-" if row.coverage is None else f"{row.coverage:.0%}",
                    f"{row.identified:.0%}",
                )
                for row in design.size_ratio
            ),
        )
    if design.studies:
        noise = design.noise
        console.print(
            f"of {design.studies} simulated studies, seed {design.seed}; prior: {design.prior_source}; losses scatter "
            f"by {100 * noise['series']:.2g} % a series and {100 * noise['run']:.2g} % a run"
        )
    _print_notes(console, design.notes)


def print_proposal(
    console: Console, space: Space, found: Proposal, expected: DesignDocument, written: str
) -> None:
    """Print a proposed grid, what it costs, what is expected of it, and the YAML to paste."""
    rows = []
    cost = found.grid.gpu_hours_of_sizes(space)
    for size, seeds, hours in zip(space.sizes, found.grid.seeds, cost, strict=True):
        parameters = {rung.architecture: rung.n_params for rung in space.rungs if rung.size == size}
        cells = [human(parameters[name]) for name in space.architectures]
        rows.append((size, *cells, str(seeds), f"{hours:.4g}"))
    _print_table(console, "proposed grid", ("size", *space.architectures, "seeds", "GPU-hours"), rows)
    counts = ", ".join(f"{count:,}" for count in found.grid.iterations)
    console.print(f"iterations {counts}; {found.gpu_hours:.4g} GPU-hours left to spend")
    print_design(console, expected)
    console.print("in the study:")
    console.print(written)


def print_scale_up(console: Console, proposed: ScaleUp | None, seen: Sequence[Seen]) -> None:
    """Print what to train next, where it was asked for, and how what was foreseen before turned out."""
    if proposed is not None:
        _print_step(console, proposed)
    elif not seen:
        console.print("nothing has finished yet outside what the proposals were made from")
    _print_table(
        console,
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
        (
            (
                one.architecture,
                one.run_id,
                human(one.n_params),
                f"{one.iterations:,.0f}",
                _number(one.predicted, 4),
                _interval(one.run95, 4),
                _number(one.loss, 4),
                "-" if one.inside is None else "yes" if one.inside else "no",
                percent(one.relative_error),
                _beyond(one.size_factor, one.budget_factor),
            )
            for one in seen
        ),
    )


def _print_laws(console: Console, points: CheckedPoints, document: FitDocument) -> None:
    names = list(next(iter(document.architectures.values())).params)
    rows = []
    for name, fitted in document.architectures.items():
        cells = []
        for key in names:
            interval = fitted.ci95.get(key)
            spread = f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else ""
            cells.append(f"{fitted.params[key]:.4g}{spread}")
        series = str(points.of(name)["cluster"].nunique())
        rows.append(
            (name, str(fitted.n_points), series, *cells, f"{fitted.objective:.4g}", str(fitted.status))
        )
    columns = ("architecture", "points", "series", *names, "objective", "status")
    _print_table(console, f"{document.law}: {document.formula}", columns, rows)


def _print_exponents(console: Console, document: FitDocument) -> None:
    rows = []
    for name, found in document.isoflop.items():
        cells = []
        for method, interval in (
            ("isoflop", False),
            ("corrected", True),
            ("envelope", False),
            ("parametric", True),
        ):
            one = found.exponents.get(method)
            cells.append(_number(one.value if one else None, 3))
            if interval:
                cells.append(_interval(one.ci95 if one else None, 3))
        if found.exponents:
            rows.append((name, *cells, str(len(found.optima))))
    _print_table(
        console,
        "compute-optimal size: N grows as FLOPs to this power, by method",
        ("architecture", "isoflop", "corrected", "95 %", "envelope", "law", "95 %", "budgets"),
        rows,
    )


def _print_step(console: Console, proposed: ScaleUp) -> None:
    _print_table(
        console,
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
        (
            (
                step.architecture,
                human(step.n_params),
                " to ".join(human(end) for end in step.n_params_ci95),
                f"{step.iterations:,}",
                f"{step.gpu_hours:.3g}",
                _number(step.loss, 4),
                _interval(step.ci95, 4),
                _interval(step.run95, 4),
                _beyond(step.size_factor, step.budget_factor),
            )
            for step in proposed.steps
        ),
    )
    _print_notes(console, proposed.notes)


def _print_notes(console: Console, notes: Iterable[Note], about: str = "") -> None:
    for note in notes:
        console.print(f"note {note.code}{about}: {note.text}")


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table that has rows; names and verdicts stand left, numbers right.

    Cells are printed as they are: a foreign table's names may hold what rich reads as markup.
    """
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        left = name in {"architecture", "status"}
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    if table.row_count:
        console.print(table)


def _estimate(row: SizeRatio | TokenGain) -> tuple[str, str, str]:
    """The last cells of a comparison: what the laws give, its interval, how far it is to be believed."""
    return _number(row.estimate, 2), _interval(row.estimate_ci95, 2), row.status


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _interval(ends: tuple[float, float] | None, decimals: int) -> str:
    return "-" if ends is None else " to ".join(_number(end, decimals) for end in ends)


def _beyond(size_factor: float, budget_factor: float) -> str:
    return f"{max(size_factor, budget_factor):.3g}x"
