"""`ssmscale tune`: the best values of keys at the smaller sizes, and the learning rates that follow for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from harness import submission
from harness.cli_submit import confirm
from harness.destination import Destination, destination_of
from harness.opening import place_of
from harness.options import (
    ClusterOption,
    JsonOption,
    RootOption,
    SetOption,
    StudyArgument,
    YesOption,
    cluster_said,
)
from harness.plan import make_plan
from harness.profile import Profile, lasting_name
from harness.remote import check_cluster
from harness.terminal import console, errors, print_json
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from harness.tuning.space import Cell, Space
    from harness.tuning.trials import Told
    from harness.tuning.workplace import Workplace


def tune(
    context: typer.Context,
    study: StudyArgument,
    on: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="local|slurm|ray|auto",
            help="Where trials are trained, as for submit, though ray is this machine's own, whatever SSMSCALE_CLUSTER "
            "says; this process stays and controls the search.",
        ),
    ],
    root: RootOption = None,
    changes: SetOption = None,
    cluster: ClusterOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search the study's `tune:` keys for its smaller sizes, and carry the learning rate to the others (Optuna).

    Each trial is a run like any other. Killed and started again it goes on; started again after a trial failed it tries
    others, and ends with 0 unless one fails again. What it learns is kept beside the study in tuned.json, where `lr:
    tuned` finds it.
    """
    from harness.tuning.report import describe, print_tuning, tuning_document
    from harness.tuning.session import tune_study
    from harness.tuning.space import Space

    if on == "ray" and (cluster := cluster_said(context, cluster)) is not None:
        raise InputError(
            f"--on ray --cluster {cluster}: a search packs its trials here alone; --on slurm makes them jobs"
        )
    there = destination_of(on, cluster)
    profile = there.profile
    loaded, place = place_of(study, root, changes)
    space = Space(loaded, place, study)
    trials = [space.trial(cell.architecture, cell.size, space.corner()) for cell in space.cells]
    submission.check_before_training(trials[0])
    if profile is not None:
        check_cluster(profile, trials[0])
        hours = _gpu_hours(space, trials, profile)
        confirm(hours, profile.name, profile.confirm_gpu_hours, yes=yes)
    out = errors if as_json else console

    def say(cell: Cell, told: Told) -> None:
        out.print(describe(cell, told), markup=False)

    done = tune_study(space, lambda: _workplace(space, there), say)
    if as_json:
        print_json(tuning_document(done))
    else:
        print_tuning(console, done)
    if done.failed:
        raise typer.Exit(1)


def _workplace(space: Space, there: Destination) -> Workplace:
    from harness.tuning.workplace import Here, OnSlurm

    study = space.trial(space.cells[0].architecture, space.cells[0].size, space.corner()).study
    if there.profile is None or there.cluster is None:
        return Here(space.root, study, there.on)
    return OnSlurm(space.root, study, there.profile, lasting_name(there.cluster))


def _gpu_hours(space: Space, trials: list[submission.ResolvedStudy], profile: Profile) -> float:
    """What all trials take if none is pruned and none was trained before, `trials` being one of each cell."""
    cluster = profile.cluster()
    plans = [make_plan(one.study, one.points, one.corpus, one.root, cluster) for one in trials]
    return space.tune.trials * sum(run.gpu_hours for plan in plans for run in plan.runs)
