"""How a tuning is told: a line a trial, a table of optima, and one JSON document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from harness.sheet import Sheet
from harness.terminal import counted
from harness.tuned import TunedSize
from harness.tuning.session import Tuning
from harness.tuning.space import Cell
from harness.tuning.trials import Told, finished


def describe(cell: Cell, told: Told) -> str:
    """A trial that is over, in a line."""
    name = f"{cell.architecture} {cell.size} trial {told.number} ({_listed(told.values)})"
    if told.ending.loss is not None:
        return f"{name}: loss {told.ending.loss:.4f}"
    return f"{name}: {told.outcome}" + (f" ({told.ending.reason})" if told.ending.reason else "")


def print_tuning(console: Console, done: Tuning) -> None:
    """Each searched size with its optimum, each other size with the learning rate it is given, and the notes."""
    numbers = ("parameters", "trials", "steps", "best loss", "learning rate")
    columns = ("architecture", "size", *numbers, "95 % interval", "best trial")
    table = Sheet(f"tuning of {done.space.study.name}", columns, numbers)
    for cell, row in _rows(done).items():
        table.add_row(
            cell.architecture,
            cell.size,
            f"{cell.n_params:,}",
            ", ".join(f"{count} {outcome}" for outcome, count in row["trials"].items()) or "0",
            f"{row['steps']:,}",
            "-" if row["best"] is None else f"{row['best']['loss']:.4f}",
            "-" if row["lr"] is None else f"{row['lr']:g}",
            "-" if row["ci95"] is None else "{:g} to {:g}".format(*row["ci95"]),
            "-" if row["best"] is None else _listed(row["best"]["values"]),
        )
    for architecture, found in done.tuned.architectures.items() if done.tuned else ():
        for size in found.carried:
            interval = "{:g} to {:g}".format(*size.ci95)
            cells = ("-", "-", "-", f"{size.lr:g}", interval, "carried by the law")
            table.add_row(architecture, size.size, f"{size.n_params:,}", *cells)
    table.print(console)
    for architecture, found in done.tuned.architectures.items() if done.tuned else ():
        if found.law and done.tuned:
            low, high = found.law.slope_ci95
            console.print(
                f"{architecture}: learning rate ~ {done.tuned.scale_by}^{found.law.slope:.3f}, exponent "
                f"{low:.3f} to {high:.3f}",
                markup=False,
            )
    for note in done.notes:
        console.print(f"note {note.code}: {note.text}", markup=False)
    if done.is_kept:
        path = done.space.root.study(done.space.study.name) / "tuned.json"
        console.print(
            f"kept in {path}; `lr: tuned` in the study takes its learning rates from there", markup=False
        )
    if done.failed:
        console.print(
            f"{counted(len(done.failed), 'trial')} failed; the same command tries others", markup=False
        )


def tuning_document(done: Tuning) -> dict[str, Any]:
    """The document of `ssmscale tune --json`."""
    path = done.space.root.study(done.space.study.name) / "tuned.json"
    laws = done.tuned.architectures if done.tuned else {}
    return {
        "study": done.space.study.name,
        "iterations": done.space.iterations,
        "cells": [
            {
                "architecture": cell.architecture,
                "size": cell.size,
                "n_params": cell.n_params,
                **row,
            }
            for cell, row in _rows(done).items()
        ],
        "laws": {
            name: None if found.law is None else found.law.model_dump(mode="json")
            for name, found in laws.items()
        },
        "carried": [
            {"architecture": name, **size.model_dump(mode="json")}
            for name, found in laws.items()
            for size in found.carried
        ],
        "notes": [{"code": note.code, "text": note.text} for note in done.notes],
        "tuned": str(path) if done.is_kept else None,
    }


def _rows(done: Tuning) -> Mapping[Cell, dict[str, Any]]:
    """What is told of each cell."""
    found: dict[tuple[str, str], TunedSize] = {
        (name, size.size): size
        for name, architecture in (done.tuned.architectures if done.tuned else {}).items()
        for size in architecture.sizes
    }
    rows = {}
    for cell, told in done.told.items():
        best = min(finished(told), key=lambda one: one[1], default=None)
        size = found.get((cell.architecture, cell.size))
        rows[cell] = {
            "trials": dict(Counter(str(one.outcome) for one in told)),
            "steps": done.steps[cell],
            "best": None if best is None else {"values": best[0].values, "loss": best[1]},
            "lr": None if size is None else size.lr,
            "ci95": None if size is None else list(size.ci95),
        }
    return rows


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('training.')} {value}" for key, value in values.items())
