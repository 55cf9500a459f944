"""How the next step looks in a terminal, and how former ones turned out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from analysis.scale_up import ScaleUp, Seen
from analysis.terminal import add, titled
from analysis.wording import human, percent


def print_scale_up(console: Console, proposed: ScaleUp | None, seen: Sequence[Seen]) -> None:
    """Print what to train next, where it was asked for, and how what was foreseen before turned out."""
    if proposed is not None:
        _print_step(console, proposed)
    if seen:
        _print_seen(console, seen)
    elif proposed is None:
        console.print("nothing has finished yet outside what the proposals were made from", markup=False)


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
        console.print(f"note {note.code}: {note.text}", markup=False)


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
