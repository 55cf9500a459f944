"""`ssmscale plan`: the sizes of a study, what is left to train and what it will cost."""

from __future__ import annotations

from collections.abc import Sequence

from harness.cli.options import (
    ClusterOption,
    DesignOptions,
    EveryRunOption,
    JsonOption,
    RootOption,
    SetOption,
    StudyArgument,
)
from harness.cli.terminal import Table, coloured, listed
from harness.common.console import console, print_json
from harness.common.format import Estimate, counted, duration, short, spread
from harness.plan.plan import Plan, PlannedRun
from harness.record.status import count_states
from harness.study.run import by_series
from harness.submit.monitor import planned
from ssmttm.errors import InputError


def plan(
    study: StudyArgument,
    *,
    root: RootOption = None,
    changes: SetOption = None,
    cluster: ClusterOption = None,
    every_run: EveryRunOption = False,
    questions: DesignOptions,
    as_json: JsonOption = False,
) -> None:
    """Show what is left to train and what it costs; train nothing."""
    resolved, made = planned(study, root, changes, cluster)
    asked = questions.design or questions.budget is not None
    if not asked and (questions.prior or questions.law or questions.reference):
        raise InputError("--prior, --law and --reference go with --design or --budget; add one of them")
    document = made.as_json()
    if not as_json:
        print_plan(made, every_run=every_run)
    if asked:
        from harness.cli.analysis import examine_design

        examine_design(resolved, made, questions, document, as_json=as_json)
    if as_json:
        print_json(document)


def print_plan(plan: Plan, *, every_run: bool = False) -> None:
    """Print the sizes and the plan as tables, then notes, and the totals last."""
    _print_sizes(plan)
    if every_run:
        _print_runs(plan)
    else:
        _print_grouped(plan)
    for why in _reasons(plan):
        console.print(f"why {why}")
    for code, text in plan.notes:
        console.print(f"note {code}: {text}")
    _print_totals(plan)


def _print_runs(plan: Plan) -> None:
    costs = ("nodes x GPUs", "ZeRO", "micro", "GiB", "disk GiB", "time added", "GPU-hours")
    numbers = ("parameters", "iterations", "tokens", "FLOPs", "seed", *costs)
    table = Table(f"plan of {plan.study.name}", ("run", "architecture", "size", *numbers, "state"), numbers)
    for run in plan.runs:
        status, layout, memory = run.status, run.layout, run.size.resources.memory.gib
        table.add_row(
            status.run_id if plan.identified else "-",
            status.point.architecture,
            status.point.size,
            f"{run.cost.n_params:,}",
            f"{status.point.run.iterations:,}",
            short(run.cost.tokens),
            f"{run.cost.flops:.2e}",
            str(status.point.run.seed),
            f"{run.size.nodes} x {run.gpus // run.size.nodes}",
            f"{layout.zero_stage}",
            f"{layout.micro_batch} x {layout.accumulation}{'+' if layout.activation_checkpointing else ''}",
            f"{memory.expected:.2f} ({memory.low:.2f} to {memory.high:.2f})",
            f"{run.disk_gib:.3g}",
            spread(run.hours),
            f"{run.gpu_hours:.3g}",
            coloured(status.state),
        )
    table.print(console)


def _print_grouped(plan: Plan) -> None:
    groups: dict[tuple[str, str], list[PlannedRun]] = {
        (size["size"], size["architecture"]): [] for size in plan.sizes()
    }
    for run in plan.runs:
        groups[run.status.point.size, run.status.point.architecture].append(run)
    columns = ("size", "architecture", "iterations", "runs", "GPUs", "GiB", "disk GiB", "GPU-hours")
    table = Table(f"plan of {plan.study.name}; --runs shows each run", columns, columns[4:])
    for (size, architecture), runs in groups.items():
        one = runs[0]
        table.add_row(
            size,
            architecture,
            _iterations(runs),
            listed(count_states([run.status for run in runs])),
            f"{one.gpus}" if one.size.nodes == 1 else f"{one.size.nodes} x {one.gpus // one.size.nodes}",
            f"{one.size.resources.memory.gib.expected:.3g}",
            f"{sum(run.disk_gib for run in runs):.3g}",
            short(sum(run.gpu_hours for run in runs)),
        )
    table.print(console)


def _iterations(runs: Sequence[PlannedRun]) -> str:
    """Return the iteration counts of these runs: 10k; or the ends and the number of counts: 5k-100k (8)."""
    counts = sorted({run.status.point.run.iterations for run in runs})
    low, high = (
        f"{count // 1000:,}k" if count % 1000 == 0 else f"{count:,}" for count in (counts[0], counts[-1])
    )
    return low if len(counts) == 1 else f"{low}-{high} ({len(counts)})"


def _print_totals(plan: Plan) -> None:
    totals = plan.totals()
    spent, alone = totals["gpu_hours"], totals["gpu_hours_independent"]
    left = plan.left
    some = f"{len(left):,} of " if len(left) < totals["runs"] else ""
    runs = f"{some}{counted(totals['runs'], 'run')} in {counted(len(by_series(left)), 'series')}"
    likely = f"{short(totals['gpu_hours_low'])} to {short(totals['gpu_hours_high'])}"
    needed = f"{short(spent)} GPU-hours ({likely}) on {runs}" if left else "nothing: all is over"
    lines = [("to spend", needed)]
    if totals["gpu_hours_reused"]:
        lines.append(("finished", f"{short(totals['gpu_hours_reused'])} GPU-hours"))
    if spent:
        longest = Estimate(*(totals[f"longest_path_hours{end}"] for end in ("_low", "", "_high")))
        apart = duration(totals["branches_apart_hours"])
        lines += [
            ("trunks save", f"{short(alone - spent)} of {short(alone)} GPU-hours ({1 - spent / alone:.0%})"),
            ("longest path", f"{spread(longest)} for the longest series"),
            ("", f"{apart} if each of its branches is a job of its own"),
        ]
    disk = f"{totals['disk_gib']:.3g} GiB when all is done, {totals['disk_peak_gib']:.3g} GiB on the way"
    for name, text in [*lines, ("disk", disk)]:
        console.print(f"{name:<14}{text}")


def _reasons(plan: Plan) -> list[str]:
    """Return the reasons for resources, a line for each layout of which the harness chose the ranks."""
    found: dict[str, list[str]] = {}
    for run in plan.runs:
        point = run.status.point
        if plan.study.resources_of(point.architecture, point.size).ranks is None:
            sentence = "; ".join(f"{key} {text}" for key, text in run.size.resources.why.items())
            found.setdefault(sentence, []).append(f"{point.size} ({point.architecture})")
    return [f"{', '.join(dict.fromkeys(names))}: {sentence}" for sentence, names in found.items()]


def _print_sizes(plan: Plan) -> None:
    """Print each size, and how far its parameters are off the study's target and off a published model."""
    sizes = plan.sizes()
    off = {
        title: key
        for title, key in (("vs asked", "deviation"), ("vs published", "reference_deviation"))
        if any(size[key] is not None for size in sizes)
    }
    numbers = ("blocks", "width", "parameters", *off)
    table = Table(f"sizes of {plan.study.name}", ("size", "architecture", *numbers), numbers)
    for size in sizes:
        cells = (f"{size['n_blocks']}", f"{size['d_model']}", f"{size['n_params']:,}")
        apart = ("-" if size[key] is None else f"{size[key]:+z.2%}" for key in off.values())
        table.add_row(size["size"], size["architecture"], *cells, *apart)
    table.print(console)
