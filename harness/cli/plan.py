"""`ssmscale plan`: the sizes of a study, what is left to train and what it will cost."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from harness.cli.options import (
    ClusterOption,
    DesignOptions,
    JsonOption,
    RootOption,
    SetOption,
    StudyArgument,
)
from harness.cli.terminal import Table, coloured
from harness.common.console import console, print_json
from harness.common.format import NOTHING, Estimate, counted, duration, short, spread
from harness.plan.plan import Plan, PlannedRun
from harness.record.status import count_states
from harness.submit.monitor import planned
from ssmttm.errors import InputError


def plan(
    study: StudyArgument,
    *,
    root: RootOption = None,
    changes: SetOption = None,
    cluster: ClusterOption = None,
    questions: DesignOptions,
    as_json: JsonOption = False,
) -> None:
    """What is left to train and what it will cost; trains nothing."""
    resolved, made = planned(study, root, changes, cluster)
    asked = questions.design or questions.budget is not None
    if not asked and (questions.prior or questions.law or questions.reference):
        raise InputError("--prior, --law and --reference: are about --design and --budget; add one of them")
    document = made.as_json()
    if not as_json:
        print_plan(console, made)
    if asked:
        from harness.cli.analysis import examine_design

        examine_design(resolved, made, questions, document, as_json=as_json)
    if as_json:
        print_json(document)


MOST_ROWS = 200
"""Runs that are shown one by one; above it a row stands for all Series of a size."""
COSTS = ("nodes x GPUs", "ZeRO", "micro", "GiB", "disk GiB", "time added", "GPU-hours")


def print_plan(console: Console, plan: Plan) -> None:
    """Print the sizes and the plan as tables, its totals and its notes."""
    _print_sizes(console, plan)
    if len(plan.runs) <= MOST_ROWS:
        _print_runs(console, plan)
    else:
        _print_grouped(console, plan)
    _print_totals(console, plan)
    for why in _reasons(plan):
        console.print(f"why {why}")
    for code, text in plan.notes:
        console.print(f"note {code}: {text}")


def _print_runs(console: Console, plan: Plan) -> None:
    numbers = ("parameters", "iterations", "tokens", "FLOPs", "seed", *COSTS)
    table = Table(f"plan of {plan.study.name}", ("run", "architecture", "size", *numbers, "state"), numbers)
    for run in plan.runs:
        status = run.status
        table.add_row(
            status.run_id if plan.identified else "-",
            status.point.architecture,
            status.point.size,
            f"{run.cost.n_params:,}",
            f"{status.point.run.iterations:,}",
            short(run.cost.tokens),
            f"{run.cost.flops:.2e}",
            str(status.point.run.seed),
            *_cost_cells(run, [run]),
            coloured(status.state),
        )
    table.print(console)


def _print_grouped(console: Console, plan: Plan) -> None:
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in plan.runs:
        groups.setdefault((run.status.point.architecture, run.status.point.size), []).append(run)
    numbers = ("parameters", "series", "runs", "iterations", "tokens", "FLOPs", *COSTS)
    title = f"plan of {plan.study.name}, a row a size; --json tells each of {len(plan.runs):,} runs"
    table = Table(title, ("architecture", "size", *numbers, "states"), numbers)
    for (architecture, size), runs in groups.items():
        lengths = sorted({run.status.point.run.iterations for run in runs})
        states = count_states([run.status for run in runs])
        table.add_row(
            architecture,
            size,
            f"{runs[0].cost.n_params:,}",
            f"{len({run.status.series_id for run in runs}):,}",
            f"{len(runs):,}",
            f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}",
            short(sum(run.cost.tokens for run in runs)),
            f"{sum(run.cost.flops for run in runs):.2e}",
            *_cost_cells(runs[0], runs),
            ", ".join(f"{count:,} {state}" for state, count in states.items()),
        )
    table.print(console)


def _cost_cells(one: PlannedRun, runs: Sequence[PlannedRun]) -> list[str]:
    layout, a_node, memory = one.layout, one.gpus // one.size.nodes, one.size.resources.memory.gib
    again = "+" if layout.activation_checkpointing else ""
    return [
        f"{one.size.nodes} x {a_node}",
        f"{layout.zero_stage}",
        f"{layout.micro_batch} x {layout.accumulation}{again}",
        f"{memory.expected:.2f} ({memory.low:.2f} to {memory.high:.2f})",
        f"{sum(run.disk_gib for run in runs):.3g}",
        spread(sum((run.hours for run in runs), NOTHING)),
        f"{sum(run.gpu_hours for run in runs):.3g}",
    ]


def _print_totals(console: Console, plan: Plan) -> None:
    totals = plan.totals()
    spent, alone = totals["gpu_hours"], totals["gpu_hours_independent"]
    share = f" (trunks shared: {spent / alone:.2f} of that)" if alone else ""
    console.print(
        f"{counted(totals['runs'], 'run')} in {counted(totals['series'], 'series')}; to spend {spent:.4g} GPU-hours "
        f"({totals['gpu_hours_low']:.3g} to {totals['gpu_hours_high']:.3g}), {alone:.4g} if no trunk were "
        f"shared{share}; finished already {totals['gpu_hours_reused']:.4g}"
    )
    if spent:
        longest = Estimate(*(totals[f"longest_path_hours{end}"] for end in ("_low", "", "_high")))
        console.print(
            f"the longest series takes {spread(longest)} with its branches one after the other, "
            f"{duration(totals['branches_apart_hours'])} were they jobs of their own"
        )
    console.print(
        f"on disk {totals['disk_gib']:.3g} GiB when all is done, {totals['disk_peak_gib']:.3g} GiB on the way there"
    )


def _reasons(plan: Plan) -> list[str]:
    """Return the reasons for resources, a line for each layout of which the harness chose the ranks."""
    said: dict[str, list[str]] = {}
    for run in plan.runs:
        point = run.status.point
        if plan.study.resources_of(point.architecture, point.size).ranks is None:
            sentence = "; ".join(f"{key} {text}" for key, text in run.size.resources.why.items())
            said.setdefault(sentence, []).append(f"{point.size} ({point.architecture})")
    return [f"{', '.join(dict.fromkeys(names))}: {sentence}" for sentence, names in said.items()]


def _print_sizes(console: Console, plan: Plan) -> None:
    """Print each size beside the parameters the study asks for and those of a published model, where there are any."""
    sizes = plan.sizes()
    beside = {
        key: (title, off)
        for key, title, off in (
            ("target_n_params", "asked for", "deviation"),
            ("reference_n_params", "published", "reference_deviation"),
        )
        if any(size[key] is not None for size in sizes)
    }
    numbers = ["blocks", "width", "parameters"]
    for title, _ in beside.values():
        numbers += [title, f"off {title.split()[0]}"]
    table = Table(f"sizes of {plan.study.name}", ("size", "architecture", *numbers), numbers)
    for size in sizes:
        cells = [f"{size['n_blocks']}", f"{size['d_model']}", f"{size['n_params']:,}"]
        for key, (_, off) in beside.items():
            known = size[key] is not None
            cells += [f"{size[key]:,.0f}", f"{size[off]:+z.2%}"] if known else ["-", "-"]
        table.add_row(size["size"], size["architecture"], *cells)
    table.print(console)
