"""How an expected study looks in a terminal: each parameter's interval, the size ratio's, and every note."""

from __future__ import annotations

from rich.console import Console

from analysis.budget import Proposal
from analysis.design import DesignDocument
from analysis.space import Space
from analysis.terminal import add, titled
from analysis.wording import budget, human


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
            f"by {100 * noise['series']:.2g} % a series and {100 * noise['run']:.2g} % a run",
            markup=False,
        )
    for note in design.notes:
        console.print(f"note {note.code}: {note.text}", markup=False)


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
    counts = ", ".join(f"{count:,}" for count in found.grid.counts)
    console.print(f"iterations {counts}; {found.gpu_hours:.4g} GPU-hours left to spend", markup=False)
    print_design(console, expected)
    console.print("in the study:", markup=False)
    console.print(written, markup=False)
