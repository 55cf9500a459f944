"""`ssmscale tune`: search keys at the smaller sizes, and carry learning rates to the others.

Prints a line for each trial and a table of optima; with --json one document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from harness.cli.options import (
    ClusterOption,
    JsonOption,
    OnOption,
    RootOption,
    SetOption,
    StudyArgument,
    YesOption,
    named_cluster,
)
from harness.cli.tasks import confirm
from harness.cli.terminal import Table
from harness.common.console import console, errors, print_json
from harness.common.format import counted
from harness.plan.cluster import Cluster
from harness.plan.plan import make_plan
from harness.record.registry import ResolvedStudy, check_before_training, place_of
from harness.study.tune import TunedSize
from harness.submit.target import backends_of, target_of
from harness.tuning.runner import open_runner
from harness.tuning.session import Tuning, tune_study
from harness.tuning.space import SearchCase, Space
from harness.tuning.trials import TrialRecord, finished
from ssmttm.errors import InputError


def tune(
    context: typer.Context,
    study: StudyArgument,
    *,
    root: RootOption = None,
    on: OnOption,
    changes: SetOption = None,
    cluster: ClusterOption = None,
    yes: YesOption = False,
    lost: Annotated[
        str | None,
        typer.Option(
            "--release-lost",
            metavar="ID",
            help="Give up the trials that run under another ROOT, by the first digits of its root.json.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tune small sizes and carry the learning rate to the large ones.

    Optuna searches the keys that the study names under `tune:`. Each trial is a run like any other, trained where --on
    says; --on ray uses this machine, whatever SSMSCALE_CLUSTER says. This process controls the search to its end. The
    same command goes on with a search that was stopped, and replaces trials that failed. Results are kept beside the
    study in tuned.json, where `lr: tuned` finds them.
    """
    if on == "ray" and (cluster := named_cluster(context, cluster)) is not None:
        raise InputError(
            f"--on ray --cluster {cluster}: a search packs trials on this machine only; use --on slurm on a cluster"
        )
    target = target_of(on, cluster)
    if target.profile is not None:  # packed or not, a trial is a job of its own
        target = replace(target, on="slurm")
    loaded, place = place_of(study, root, changes)
    space = Space(loaded, place, study)
    trials = [space.trial(case.architecture, case.size, space.corner()) for case in space.cases]
    check_before_training(trials[0])
    (backend,) = backends_of(target, trials[0])
    backend.check(trials[0].places)
    if backend.outlives:
        hours = _gpu_hours(space, trials, backend.offer(trials[0].places))
        confirm(hours, backend.where, backend.confirm_gpu_hours, yes=yes)
    out = errors if as_json else console
    done = tune_study(
        space,
        lambda: open_runner(backend, trials[0]),
        lambda case, trial: out.print(_described(case, trial)),
        lost,
    )
    if as_json:
        print_json(_document(done))
    else:
        _print_tuning(done)
    if done.failed:
        raise typer.Exit(1)


def _gpu_hours(space: Space, trials: list[ResolvedStudy], cluster: Cluster) -> float:
    """Return the GPU-hours of all trials if none is pruned and none is trained yet; `trials` has one of each case."""
    plans = [make_plan(one.study, one.points, one.corpus, one.root, cluster) for one in trials]
    return space.tune.trials * sum(run.gpu_hours for plan in plans for run in plan.runs)


def _described(case: SearchCase, trial: TrialRecord) -> str:
    """Return a line about a trial that is over."""
    name = f"{case.architecture} {case.size} trial {trial.number} ({_listed(trial.values)})"
    if trial.result.loss is not None:
        return f"{name}: loss {trial.result.loss:.4f}"
    return f"{name}: {trial.result.outcome}" + (f" ({trial.result.reason})" if trial.result.reason else "")


def _print_tuning(done: Tuning) -> None:
    """Print each searched size with its optimum, each other size with its learning rate, and the notes."""
    numbers = ("parameters", "trials", "steps", "best loss", "learning rate")
    columns = ("architecture", "size", *numbers, "95 % interval", "best trial")
    table = Table(f"tuning of {done.space.study.name}", columns, numbers)
    for case, row in _rows(done).items():
        table.add_row(
            case.architecture,
            case.size,
            f"{case.n_params:,}",
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
                f"{low:.3f} to {high:.3f}"
            )
    for note in done.notes:
        console.print(f"note {note.code}: {note.text}")
    if done.is_kept:
        path = done.space.root.study(done.space.study.name) / "tuned.json"
        console.print(f"kept in {path}; `lr: tuned` in the study takes its learning rates from there")
    if done.failed:
        console.print(f"{counted(len(done.failed), 'trial')} failed; the same command tries others")


def _document(done: Tuning) -> dict[str, Any]:
    """Return the document of `ssmscale tune --json`."""
    path = done.space.root.study(done.space.study.name) / "tuned.json"
    laws = done.tuned.architectures if done.tuned else {}
    return {
        "study": done.space.study.name,
        "iterations": done.space.iterations,
        "cells": [
            {"architecture": case.architecture, "size": case.size, "n_params": case.n_params} | row
            for case, row in _rows(done).items()
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


def _rows(done: Tuning) -> Mapping[SearchCase, dict[str, Any]]:
    """Return the results of each case, for the table and the document."""
    found: dict[tuple[str, str], TunedSize] = {
        (name, size.size): size
        for name, architecture in (done.tuned.architectures if done.tuned else {}).items()
        for size in architecture.sizes
    }
    rows = {}
    for case, trials in done.records.items():
        best = min(finished(trials), key=lambda one: one[1], default=None)
        size = found.get((case.architecture, case.size))
        rows[case] = {
            "trials": dict(Counter(str(one.result.outcome) for one in trials)),
            "steps": done.steps[case],
            "best": None if best is None else {"values": best[0].values, "loss": best[1]},
            "lr": None if size is None else size.lr,
            "ci95": None if size is None else list(size.ci95),
        }
    return rows


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.removeprefix('training.')} {value}" for key, value in values.items())
