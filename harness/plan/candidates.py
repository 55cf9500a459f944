"""Other grids a study could have: their sizes, iterations and costs, a chosen one as YAML, and a plan as a table.

Sizes are the study's own and iterations lie within its range: another choice of these needs no new decision. The table
is what the analysis of a design reads: the runs the study stands for, before they have losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from harness.plan.estimate import Duration
from harness.plan.plan import Plan, PlannedRun
from harness.record.status import RunState
from harness.study.run import Schedule, ScheduleKind, branch_step
from harness.study.schema import Study

MOST_COUNTS = 8
ENOUGH_COUNTS = 6
"""With fewer of its own, a study's counts are joined by those half-way between them."""


def gpu_hours_an_iteration(plan: Plan) -> dict[str, dict[float, float]]:
    """GPU-hours of one iteration, by architecture and parameters."""
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
    """Its evaluation at the end, and its branch point."""
    gpu_hours_a_series: float
    """A job's start."""


@dataclass(frozen=True)
class Candidates:
    """Sizes in ascending order, iteration counts likewise, and the schedule that says what a series of them takes."""

    sizes: tuple[Candidate, ...]
    counts: tuple[int, ...]
    schedule: Schedule
    done: Mapping[tuple[str, str, int], frozenset[int]]
    """Iteration counts that have been trained already, by architecture, size and seed."""

    @property
    def shares_trunk(self) -> bool:
        """True if runs of different length are one series."""
        return self.schedule.kind is ScheduleKind.WSD

    def hours(self, architecture: str, size: str, counts: Sequence[int], seed: int) -> float:
        """GPU-hours of what is left of one seed: from the branch of the run before to a run's own end, as in a plan."""
        (one,) = (one for one in self.sizes if (one.architecture, one.size) == (architecture, size))
        done = self.done.get((architecture, size, seed), frozenset())
        behind, steps = 0, 0
        for count in sorted(counts):
            steps += 0 if count in done else count - behind
            behind = branch_step(self.schedule, count) if self.shares_trunk else 0
        left = len(set(counts) - done)
        series = min(1, left) if self.shares_trunk else left
        return (
            steps * one.gpu_hours_an_iteration + left * one.gpu_hours_a_run + series * one.gpu_hours_a_series
        )


def candidates_of(plan: Plan) -> Candidates:
    """The sizes and iteration counts of a planned study."""
    longest: dict[tuple[str, str], PlannedRun] = {}
    for planned in plan.runs:
        point = planned.status.point
        held = longest.setdefault((point.architecture, point.size), planned)
        if point.run.iterations > held.status.point.run.iterations:
            longest[point.architecture, point.size] = planned
    sizes = [_candidate(plan, planned) for planned in longest.values()]
    largest = {name: max(one.n_params for one in sizes if one.size == name) for _, name in longest}
    done: dict[tuple[str, str, int], set[int]] = {}
    for planned in plan.runs:
        run, point = planned.status.point.run, planned.status.point
        if planned.status.state is RunState.DONE:
            done.setdefault((point.architecture, point.size, run.seed), set()).add(run.iterations)
    own = {planned.status.point.run.iterations for planned in plan.runs}
    return Candidates(
        sizes=tuple(sorted(sizes, key=lambda one: (largest[one.size], one.size, one.architecture))),
        counts=_pool(sorted(own)),
        schedule=plan.study.training.schedule,
        done={key: frozenset(counts) for key, counts in done.items()},
    )


def _candidate(plan: Plan, planned: PlannedRun) -> Candidate:
    point, cost = planned.status.point, planned.cost
    iterations = point.run.iterations
    taken, rate = planned.size.duration, planned.gpus / 3600
    return Candidate(
        architecture=point.architecture,
        size=point.size,
        n_params=cost.n_params,
        tokens_an_iteration=cost.tokens / iterations,
        gpu_hours_an_iteration=(taken.step.expected + _on_the_way(plan.study, taken)) * rate,
        gpu_hours_a_run=(taken.evaluation.expected + taken.checkpoint.expected) * rate,
        gpu_hours_a_series=taken.start.expected * rate,
    )


def _on_the_way(study: Study, taken: Duration) -> float:
    """Seconds a step of periodic checkpoints and evaluations, on average."""
    every = study.tracking.eval_every
    evaluations = taken.evaluation.expected / every if every else 0.0
    return evaluations + taken.checkpoint.expected / study.resources.checkpoint_every


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
    """To two digits."""
    unit: int = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return max(1, round(value / unit) * unit)


def grid_fields(study: Study, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The study's `grid` with other iterations, seeds and replicates, and without the sizes that were not chosen."""
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
