"""Print a fit, the expected results of a design and the next step as tables of a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.design.budget import Proposal
from analysis.design.expect import DesignDocument
from analysis.design.grid import Space
from analysis.design.scale_up import ScaleUp, Seen
from analysis.findings.equal_loss import ComputeGain, SizeRatio, TokenGain
from analysis.findings.frontier import FrontierGain
from analysis.findings.note import Note
from analysis.findings.results import FitDocument
from analysis.laws.law import Interval
from analysis.points.table import CheckedPoints
from analysis.text import SCHEMES, between, budget, human, number, percent


def print_fit(console: Console, points: CheckedPoints, document: FitDocument) -> None:
    """Print the laws with their 95 % intervals, the size ratios, what was set aside, and the notes."""
    laws = []
    for name, fitted in document.architectures.items():
        row = {"architecture": name, "points": str(fitted.n_points)}
        row["series"] = str(points.of(name)["cluster"].nunique())
        for key, value in fitted.params.items():
            row[key] = f"{value:.4g} [{fitted.ci95[key][0]:.3g}, {fitted.ci95[key][1]:.3g}]"
        laws.append(row | {"objective": f"{fitted.objective:.4g}", "status": fitted.status})
    _print_choice(console, document)
    _print_table(console, f"{document.law}: {document.formula}", laws)
    _print_comparison(console, document)
    _print_others(console, document)
    _print_codebooks(console, document)
    predictions = [
        {
            "architecture": name,
            "size": human(one.n_params),
            "budget": budget(one.iterations, one.tokens or 0.0),
            "loss": _number(one.loss, 4),
            "95 %": _interval(one.ci95, 4),
            "run 95 %": _interval(one.run95, 4),
            "beyond": _beyond(one.size_factor, one.budget_factor),
        }
        for name, fitted in document.architectures.items()
        for one in fitted.predictions
    ]
    _print_table(console, "predicted loss: of the law, and of one further run", predictions)
    _print_exponents(console, document)
    how = document.resampling
    console.print(
        f"intervals: {how.interval} of {how.resamples:,} resamples, "
        f"{SCHEMES[how.scheme]}, seed {how.seed}; "
        f"points: {document.points}"
    )
    if points.exclusions:
        kinds = Counter(exclusion.code for exclusion in points.exclusions)
        console.print("set aside: " + ", ".join(f"{count} {code}" for code, count in kinds.items()))
    _print_notes(console, document.notes)
    for name, fitted in document.architectures.items():
        _print_notes(console, fitted.notes, about=f" ({name})")


def print_design(console: Console, design: DesignDocument) -> None:
    """Print the expected results of a grid, and the notes on it."""
    laws = []
    for name, parameters in design.architectures.items():
        row = {"architecture": name}
        for parameter, one in parameters.items():
            row[parameter] = f"{one.truth:.4g} [{one.ci95[0]:.3g}, {one.ci95[1]:.3g}]"
        laws.append(row)
    _print_table(
        console, f"expected of {design.law}: the prior and the median 95 % interval of its fits", laws
    )
    ratios = [
        {
            "architecture": row.architecture,
            "budget": budget(row.iterations, row.tokens),
            "reference": human(row.reference_n_params),
            "ratio": _number(row.truth, 2),
            "95 %": "none" if row.ci95 is None else _interval(row.ci95, 2),
            "coverage": "-" if row.coverage is None else f"{row.coverage:.0%}",
            "identified": f"{row.identified:.0%}",
        }
        for row in design.size_ratio
    ]
    reference = next((row.reference for row in design.size_ratio), "")
    title = f"expected size ratio against {reference}: how many times smaller for the same loss"
    _print_table(console, title, ratios)
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
    """Print a proposed grid, its cost, its expected results, and the YAML to paste."""
    rows = []
    cost = found.grid.gpu_hours_of_sizes(space)
    for size, seeds, hours in zip(space.sizes, found.grid.seeds, cost, strict=True):
        parameters = {rung.architecture: rung.n_params for rung in space.rungs if rung.size == size}
        cells = {name: human(parameters[name]) for name in space.architectures}
        rows.append({"size": size, **cells, "seeds": str(seeds), "GPU-hours": f"{hours:.4g}"})
    _print_table(console, "proposed grid", rows)
    counts = ", ".join(f"{count:,}" for count in found.grid.iterations)
    console.print(f"iterations {counts}; {found.gpu_hours:.4g} GPU-hours left to spend")
    print_design(console, expected)
    console.print("in the study:")
    console.print(written)


def print_scale_up(console: Console, proposed: ScaleUp | None, seen: Sequence[Seen]) -> None:
    """Print the proposed next step, if there is one, and the losses seen beside those predicted before."""
    if proposed is not None:
        steps = [
            {
                "architecture": step.architecture,
                "n_params": human(step.n_params),
                "95 %": " to ".join(human(end) for end in step.n_params_ci95),
                "iterations": f"{step.iterations:,}",
                "GPU-hours": f"{step.gpu_hours:.3g}",
                "loss": _number(step.loss, 4),
                "law 95 %": _interval(step.ci95, 4),
                "run 95 %": _interval(step.run95, 4),
                "beyond": _beyond(step.size_factor, step.budget_factor),
            }
            for step in proposed.steps
        ]
        title = f"next step for {proposed.budget_gpu_hours:g} GPU-hours, by {proposed.law}"
        _print_table(console, title, steps)
        _print_notes(console, proposed.notes)
    elif not seen:
        console.print("no run has finished yet beyond the runs from which the proposals were made")
    rows = [
        {
            "architecture": one.architecture,
            "run": one.run_id,
            "n_params": human(one.n_params),
            "iterations": f"{one.iterations:,.0f}",
            "predicted": _number(one.predicted, 4),
            "run 95 %": _interval(one.run95, 4),
            "seen": _number(one.loss, 4),
            "inside": "-" if one.inside is None else "yes" if one.inside else "no",
            "error": percent(one.relative_error),
            "beyond": _beyond(one.size_factor, one.budget_factor),
        }
        for one in seen
    ]
    _print_table(console, "predicted and seen: runs beyond the range to which the law was fitted", rows)


def _print_choice(console: Console, document: FitDocument) -> None:
    """Print the errors of the law, or of all that were tried and why one was chosen."""
    choice = document.law_choice
    if choice is not None:
        tried = [
            {
                "law": one.law,
                "parameters": str(one.parameters),
                "in the sample": _percent(one.in_sample_rms),
                "largest size": _percent(one.largest_size_rms),
                "longest budget": _percent(one.longest_budget_rms),
                "largest compute": _percent(one.largest_compute_rms),
                "pattern p": "-" if one.pattern_p is None else f"{one.pattern_p:.2g}",
                "status": "admissible" if one.admissible else one.reason,
            }
            for one in choice.laws
        ]
        title = "errors over all architectures: root mean square, in the sample and of what was left out"
        _print_table(console, title, tried)
        if len(choice.laws) > 1:
            console.print(f"law {choice.chosen}: {choice.reason}")


def _print_others(console: Console, document: FitDocument) -> None:
    others = [
        {
            "architecture": one.architecture,
            "law": one.law,
            "budget": budget(one.iterations, one.tokens),
            "reference": human(one.reference_n_params),
            "ratio": _number(one.ratio, 2),
            "95 %": _interval(one.ci95, 2),
            "status": one.status,
        }
        for one in document.comparison.other_laws
    ]
    _print_table(console, "size ratio by other laws that the points do not reject", others)


def _print_comparison(console: Console, document: FitDocument) -> None:
    """Print the size ratios, and the compute, frontier and token gains, which differ in their titles only."""
    comparison = document.comparison
    base = comparison.reference
    for title, where, quantity, rows in (
        (
            f"size ratio against {base}: how many times smaller for the same loss",
            ("budget", "reference"),
            "ratio",
            [(row, budget(row.iterations, row.tokens)) for row in comparison.size_ratio],
        ),
        (
            f"compute gain over {base}: how many times fewer FLOPs for the same loss and budget",
            ("budget", "reference"),
            "gain",
            [(row, budget(row.iterations, row.tokens)) for row in comparison.compute_gain],
        ),
        (
            f"frontier gain over {base}: how many times fewer FLOPs, each at its own compute-optimal size",
            ("FLOPs", "reference"),
            "gain",
            [(row, number(row.reference_flops)) for row in comparison.frontier_gain],
        ),
        (
            f"token gain over {base}: how many times fewer tokens for the same loss and size",
            ("reference", "size"),
            "gain",
            [(row, budget(row.iterations, row.reference_tokens)) for row in comparison.token_gain],
        ),
    ):
        cells = []
        for row, spent in rows:
            size, (value, ends) = row.reference_n_params, _estimate(row)
            by_law = {}
            if isinstance(row, FrontierGain):
                by_law = {"law": _number(row.estimate, 2), "law 95 %": _interval(row.estimate_ci95, 2)}
            cells.append(
                {
                    "architecture": row.architecture,
                    where[0]: spent,
                    where[1]: "-" if size is None else human(size),
                    "loss": _number(row.loss, 4),
                    quantity: _number(value, 2),
                    "95 %": _interval(ends, 2),
                    **by_law,
                    "status": row.status,
                }
            )
        if rows and isinstance(rows[0][0], SizeRatio):
            for cell, one in zip(cells, comparison.model_free, strict=False):
                cell["of the losses"] = (
                    "-" if one.ratio is None else f"{one.ratio:.2f} {between(one.ci95, 3)}"
                )
        _print_table(console, title, cells)


def _estimate(
    row: SizeRatio | ComputeGain | FrontierGain | TokenGain,
) -> tuple[float | None, Interval | None]:
    """Return the value and its interval, also of a row that is not identified: what the losses show, else the laws'."""
    if isinstance(row, ComputeGain):
        return row.gain, row.ci95
    if isinstance(row, FrontierGain) and row.observed is not None:
        return row.observed, row.observed_ci95
    return row.estimate, row.estimate_ci95


def _print_codebooks(console: Console, document: FitDocument) -> None:
    """Print the loss of each codebook by architecture, in nats at the size and budget of the headline."""
    rows = []
    for one in document.comparison.codebooks:
        losses = {name: _number(loss, 4) for name, loss in one.loss.items()}
        ratios = {f"ratio {row.architecture}": _number(row.estimate, 2) for row in one.size_ratio}
        rows.append({"codebook": one.codebook, **losses, **ratios})
    _print_table(console, "loss of each codebook where the size ratio is read, and its own size ratio", rows)


def _print_exponents(console: Console, document: FitDocument) -> None:
    rows = []
    for name, found in document.isoflop.items():
        row = {"architecture": name}
        for method in ("isoflop", "corrected", "envelope", "parametric"):
            one, column = found.exponents.get(method), "law" if method == "parametric" else method
            row[column] = _number(one.value if one else None, 3)
            if method != "envelope":
                row[f"{column} 95 %"] = _interval(one.ci95 if one else None, 3)
        if found.exponents:
            rows.append(row | {"budgets": str(len(found.optima))})
    _print_table(console, "compute-optimal size: N grows as FLOPs to this power, by method", rows)


def _print_notes(console: Console, notes: Iterable[Note], about: str = "") -> None:
    for note in notes:
        console.print(f"note {note.code}{about}: {note.text}")


def _print_table(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows of cells by column, if there are any: names and verdicts at the left, numbers at the right.

    Cells are printed as plain text: names may contain what rich reads as markup.
    """
    if not rows:
        return
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in rows[0]:
        left = name in {"architecture", "law", "status"}
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    console.print(table)


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2g} %"


def _interval(ends: tuple[float, float] | None, decimals: int) -> str:
    return "-" if ends is None else " to ".join(_number(end, decimals) for end in ends)


def _beyond(size_factor: float, budget_factor: float) -> str:
    return f"{max(size_factor, budget_factor):.3g}x"
