"""Other grids a study could have: their sizes, iterations and costs, a chosen one as YAML, and a plan as a table.

Their sizes are the study's own and their iterations lie within its range, so that a choice among them needs no new
decision. The analysis of a design reads the table: the runs of the study, before they have losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from harness.plan.plan import Plan, PlannedRun
from harness.record.status import RunState
from harness.study.run import Schedule, branch_step
from harness.study.schema import Study

MOST_COUNTS = 8
ENOUGH_COUNTS = 6
"""A study with fewer iteration counts gets those half-way between them too."""


def gpu_hours_an_iteration(plan: Plan) -> dict[str, dict[float, float]]:
    """Return the GPU-hours of one iteration, by architecture and parameters."""
    found: dict[str, dict[float, float]] = {}
    for one in candidates_of(plan).sizes:
        found.setdefault(one.architecture, {})[float(one.n_params)] = one.gpu_hours_an_iteration
    return found


@dataclass(frozen=True)
class Candidate:
    """A size under one architecture."""

    architecture: str
    size: str
    n_params: int
    tokens_an_iteration: float
    gpu_hours_an_iteration: float
    gpu_hours_a_run: float
    """GPU-hours of a run's evaluation at its end and of its branch point."""
    gpu_hours_a_series: float
    """GPU-hours of a job's start."""


@dataclass(frozen=True)
class Candidates:
    """Sizes and iteration counts in ascending order, and the schedule, which decides the cost of a series."""

    sizes: tuple[Candidate, ...]
    counts: tuple[int, ...]
    schedule: Schedule
    done: Mapping[tuple[str, str, int], frozenset[int]]
    """Iteration counts of finished runs, by architecture, size and seed."""

    def hours(self, architecture: str, size: str, counts: Sequence[int], seed: int) -> float:
        """Return the GPU-hours left of one seed; as in a plan, a run starts at the branch of the run before it."""
        (one,) = (one for one in self.sizes if (one.architecture, one.size) == (architecture, size))
        done = self.done.get((architecture, size, seed), frozenset())
        behind, steps = 0, 0
        for count in sorted(counts):
            steps += 0 if count in done else count - behind
            behind = branch_step(self.schedule, count)
        left = len(set(counts) - done)
        series = min(1, left) if self.schedule.shares_trunk else left
        return (
            steps * one.gpu_hours_an_iteration + left * one.gpu_hours_a_run + series * one.gpu_hours_a_series
        )


def candidates_of(plan: Plan) -> Candidates:
    """Return the sizes and iteration counts of a planned study."""
    by_size: dict[tuple[str, str], list[PlannedRun]] = {}
    done: dict[tuple[str, str, int], set[int]] = {}
    for planned in plan.runs:
        point = planned.status.point
        by_size.setdefault((point.architecture, point.size), []).append(planned)
        if planned.status.state is RunState.DONE:
            done.setdefault((point.architecture, point.size, point.run.seed), set()).add(point.run.iterations)
    longest = [max(runs, key=lambda one: one.status.point.run.iterations) for runs in by_size.values()]
    sizes = [_candidate(plan.study, planned) for planned in longest]
    largest = {one.size: max(other.n_params for other in sizes if other.size == one.size) for one in sizes}
    return Candidates(
        sizes=tuple(sorted(sizes, key=lambda one: (largest[one.size], one.size, one.architecture))),
        counts=_pool(sorted({planned.status.point.run.iterations for planned in plan.runs})),
        schedule=plan.study.training.schedule,
        done={key: frozenset(counts) for key, counts in done.items()},
    )


def _candidate(study: Study, planned: PlannedRun) -> Candidate:
    point, cost, taken, rate = planned.status.point, planned.cost, planned.size.duration, planned.gpus / 3600
    every = study.tracking.eval_every
    # Seconds a step of periodic evaluations and checkpoints, on average.
    periodic = taken.evaluation.expected / every if every else 0.0
    periodic += taken.checkpoint.expected / study.resources.checkpoint_every
    return Candidate(
        architecture=point.architecture,
        size=point.size,
        n_params=cost.n_params,
        tokens_an_iteration=cost.tokens / point.run.iterations,
        gpu_hours_an_iteration=(taken.step.expected + periodic) * rate,
        gpu_hours_a_run=(taken.evaluation.expected + taken.checkpoint.expected) * rate,
        gpu_hours_a_series=taken.start.expected * rate,
    )


def _pool(own: Sequence[int]) -> tuple[int, ...]:
    found = set(own)
    if len(own) < ENOUGH_COUNTS:
        found |= {_rounded(math.sqrt(low * high)) for low, high in pairwise(own) if high > 1.3 * low}
    ordered = sorted(found)
    if len(ordered) <= MOST_COUNTS:
        return tuple(ordered)
    last = len(ordered) - 1
    return tuple(ordered[round(index * last / (MOST_COUNTS - 1))] for index in range(MOST_COUNTS))


def _rounded(value: float) -> int:
    """Round to two digits."""
    unit: int = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return max(1, round(value / unit) * unit)


def grid_fields(study: Study, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the study's `grid` with the chosen sizes, iterations, seeds and replicates."""
    grid = study.grid.model_dump(mode="json", exclude_unset=True)
    kept = chosen["sizes"]
    architectures = {}
    for name, patch in grid["architectures"].items():
        own = {key: value for key, value in (patch or {}).items() if key != "iterations"}
        if "sizes" in own:
            own["sizes"] = {size: keys for size, keys in own["sizes"].items() if size in kept}
        architectures[name] = {key: value for key, value in own.items() if value != {}} or None
    fields = {
        "architectures": architectures,
        "sizes": {size: grid["sizes"][size] for size in grid["sizes"] if size in kept},
        "iterations": list(chosen["iterations"]),
        "seeds": list(chosen["seeds"]),
    }
    return fields | ({"replicates": chosen["replicates"]} if chosen["replicates"] else {})


COLUMNS = ("architecture", "n_params", "tokens", "iterations", "flops", "seed", "cluster", "run_id")


def design_cells(plan: Plan) -> list[Sequence[object]]:
    """Return the rows under COLUMNS; `cluster` is the Series, as in the Points table."""
    rows: list[Sequence[object]] = []
    for planned in plan.runs:
        status, cost, run = planned.status, planned.cost, planned.status.point.run
        model = (status.point.architecture, cost.n_params)
        trained = (cost.tokens, run.iterations, cost.flops, run.seed)
        rows.append((*model, *trained, status.series_id, status.run_id))
    return rows
