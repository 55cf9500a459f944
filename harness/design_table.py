"""A plan as the table that the analysis of a design reads: the runs the study stands for, before they have losses."""

from __future__ import annotations

from collections.abc import Sequence

from harness.plan import Plan

COLUMNS = ("architecture", "n_params", "tokens", "iterations", "flops", "seed", "cluster", "run_id")


def design_cells(plan: Plan) -> list[tuple[int, Sequence[object]]]:
    """The rows under COLUMNS, numbered; `cluster` is the Series, as in the Points table."""
    rows: list[tuple[int, Sequence[object]]] = []
    for number, planned in enumerate(plan.runs, start=1):
        status, cost = planned.status, planned.cost
        run, point = status.point.run, status.point
        cells = (
            point.architecture,
            cost.n_params,
            cost.tokens,
            run.iterations,
            cost.flops,
            run.seed,
            status.series_id,
            status.run_id,
        )
        rows.append((number, cells))
    return rows
