"""The verbs of the analysis: fit, report, scale-up, and the design part of `plan`.

No other module of the harness imports the analysis.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.errors import InputError as AnalysisError
from harness.cli.names import complete_study
from harness.cli.options import (
    STUDY_HELP,
    ClusterOption,
    DeltaOption,
    DesignOptions,
    JsonOption,
    LawOption,
    ReferenceOption,
    RootOption,
    StudyArgument,
    TableOptions,
)
from harness.common.console import console, errors, print_json, warn
from ssmttm.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.findings.results import FitDocument
    from analysis.points.table import CheckedPoints
    from harness.plan.plan import Plan
    from harness.record.registry import ResolvedStudy
    from harness.record.status import RunStatus
    from harness.tracking.tracker import Tracker

MISTAKES = (AnalysisError,)
"""Errors of the analysis about wrong input."""


@dataclass(frozen=True)
class FitOptions:
    """Options of the verbs that fit a law to points."""

    study: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help=STUDY_HELP, autocompletion=complete_study)
    ] = None
    law: LawOption = "chinchilla"
    delta: DeltaOption = None
    reference: ReferenceOption = None
    predict: Annotated[
        list[str] | None,
        typer.Option(
            "--predict",
            metavar="SIZE:BUDGET",
            help="Predict the loss of SIZE parameters after BUDGET iterations, or after tokens as 300M:2Btokens; "
            "repeatable (default: 2 and 4 times the largest size).",
        ),
    ] = None
    unannealed: Annotated[
        bool,
        typer.Option(
            "--unannealed",
            help="Fit the points taken mid-run in place of the annealed ones.",
        ),
    ] = False
    drop_outliers: Annotated[
        bool,
        typer.Option(
            "--drop-outliers",
            help="Leave out points far off the law fitted to all points, and list them.",
        ),
    ] = False
    root: RootOption = None


def fit(options: FitOptions, table: TableOptions, as_json: JsonOption = False) -> None:
    """Fit a scaling law to each architecture and compare them.

    Prints the laws and, at equal loss, the ratios of size, compute and tokens, with intervals.
    """
    from analysis.report.tables import print_fit

    fitted = _fit(options, table)
    if as_json:
        print_json(fitted.document.model_dump(mode="json"))
    else:
        print_fit(console, fitted.checked, fitted.document)


def report(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for report.html, figures/ and fit.json."),
    ],
    options: FitOptions,
    table: TableOptions,
) -> None:
    """Write an HTML report: curves, comparison and warnings.

    report.html is one file that needs no network.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    from analysis.report.report import Provenance, write_report
    from harness.record.provenance import commit
    from harness.tracking.sync import keep_report

    fitted = _fit(options, table)
    resolved, tracker = fitted.resolved, fitted.tracker
    provenance = Provenance(command=shlex.join(["ssmscale", *sys.argv[1:]]), commit=commit())
    page = write_report(
        fitted.checked,
        fitted.document,
        out,
        study=resolved.study.name if resolved else None,
        provenance=provenance,
        evaluations=_evaluations(resolved) if resolved else None,
        mlflow_links=tracker.links() if tracker else None,
    )
    if resolved is not None:
        keep_report(resolved, fitted.rows, out, tracker)
    console.print(str(page.absolute()))


def scale_up(
    study: StudyArgument,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="GPU_HOURS",
            help="GPU-hours of the next runs, shared evenly by architectures.",
        ),
    ] = None,
    law: LawOption = "chinchilla",
    delta: DeltaOption = None,
    root: RootOption = None,
    cluster: ClusterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Propose the next runs for a budget and predict their loss.

    Without --budget, compare earlier predictions with the losses of runs that have finished since.
    """
    from analysis.design.prior import design_law
    from analysis.design.scale_up import former_steps, next_step, seen_of
    from analysis.points.table import check_points
    from analysis.report.tables import print_scale_up
    from harness.plan.candidates import gpu_hours_an_iteration
    from harness.record.registry import add_record, read_records, record_path
    from harness.study.run import fewest_iterations
    from harness.submit.monitor import plan_of

    resolved, _, _, frame = _points(study, root)
    name, place = resolved.study.name, resolved.root
    former = former_steps(read_records(place, name), str(record_path(place, name)))
    if budget is None and not former:
        raise InputError(f"scale-up {name}: nothing was proposed yet; give --budget GPU_HOURS")
    points = check_points(frame, design_law(law))
    seen, notes = seen_of(points, former)
    warn(*notes)
    step = None
    if budget is not None:
        rates = gpu_hours_an_iteration(plan_of(resolved, cluster))
        schedule = resolved.study.training.schedule
        least, why = fewest_iterations(schedule), f"training.schedule.warmup is {schedule.warmup}"
        step = next_step(points, rates, budget, law=law, delta=delta, shortest=least, shortest_because=why)
        add_record(place, name, step.model_dump(mode="json"))
    if as_json:
        proposed = step and step.model_dump(mode="json")
        print_json(
            {"study": name, "proposed": proposed, "seen": [one.model_dump(mode="json") for one in seen]}
        )
    else:
        print_scale_up(console, step, seen)


# -- the design of a grid


def examine_design(
    resolved: ResolvedStudy, made: Plan, wanted: DesignOptions, document: dict[str, Any], *, as_json: bool
) -> None:
    """Print the simulation of the plan's grid and the proposed grid, or add them to its document."""
    from analysis.design.budget import propose
    from analysis.design.expect import expected
    from analysis.design.grid import Rung, Space, spelled
    from analysis.design.prior import choose_prior
    from analysis.design.simulate import FRESH, Draws, grid_of
    from analysis.report.tables import print_design, print_proposal
    from harness.common.validation import yaml_text
    from harness.plan.candidates import COLUMNS, candidates_of, design_cells, grid_fields

    grid = grid_of(COLUMNS, design_cells(made), resolved.study.name)
    prior = choose_prior(
        grid.frame, wanted.prior, resolved.study.design.model_dump(), wanted.law, resolved.where
    )
    design = document["design"]
    with errors.status("simulating studies") as shown:

        def progress(done: int, total: int, what: str = "studies") -> None:
            shown.update(f"{done} of {total} {what} simulated")

        if wanted.design:
            found = expected(grid, prior, wanted.reference, Draws(progress=progress))
            simulated = found.model_dump(mode="json")
            design |= simulated | {"notes": design["notes"] + simulated["notes"]}
            if not as_json:
                print_design(console, found)
        if wanted.budget is None:
            return
        there = candidates_of(made)
        rungs = tuple(
            Rung(one.architecture, one.size, one.n_params, one.tokens_an_iteration) for one in there.sizes
        )
        space = Space(rungs, there.counts, there.hours, there.schedule.shares_trunk)
        best = propose(
            space,
            prior,
            wanted.budget,
            wanted.reference,
            progress=partial(progress, what="candidate grids"),
        )
        fields = grid_fields(resolved.study, spelled(space, best.grid))
        # The studies by which it was chosen flatter it; these are others.
        fresh = replace(FRESH, progress=progress)
        found = expected(best.grid.points(space), prior, wanted.reference, fresh)
    if as_json:
        design["proposal"] = {
            "budget_gpu_hours": wanted.budget,
            "gpu_hours": best.gpu_hours,
            "grid": fields,
            "expected": found.model_dump(mode="json"),
        }
    else:
        print_proposal(console, space, best, found, yaml_text({"grid": fields}))


# -- shared by fit and report


@dataclass(frozen=True)
class _Fitted:
    """A fit, and the study that its points come from."""

    checked: CheckedPoints
    document: FitDocument
    resolved: ResolvedStudy | None
    rows: list[RunStatus]
    tracker: Tracker | None


def _evaluations(resolved: ResolvedStudy) -> pd.DataFrame:
    """Return the scores of a study's finished runs as a table."""
    import pandas as pd

    from harness.record.scores import COLUMNS, evaluation_rows

    return pd.DataFrame([asdict(row) for row in evaluation_rows(resolved)], columns=COLUMNS)


def _fit(options: FitOptions, table: TableOptions) -> _Fitted:
    from analysis.findings.document import drop_outliers, fit_points
    from analysis.findings.note import Note
    from analysis.findings.predict import asked
    from analysis.laws.catalogue import law_named
    from analysis.points.read import column_names, column_units
    from analysis.points.table import check_points, read_table
    from harness.record.points import without_points
    from harness.record.status import RunStatus, to_rounding

    study, law, delta = options.study, options.law, options.delta
    if (study is None) == (not table.points):
        raise InputError("give either a STUDY or --points FILE, and not both")
    if study is not None and (table.columns or table.units or table.tokens_from):
        raise InputError("--column, --unit and --tokens-from are of tables; give them with --points FILE")
    form, asks = law_named(law), [asked(text) for text in options.predict or ()]
    resolved, rows, tracker = None, list[RunStatus](), None
    where, best = table.where or (), [name.strip() for name in (table.best or "").split(",") if name.strip()]
    if study is None:
        frame = read_table(
            table.points or (),
            column_names(table.columns or ()),
            law=form,
            where=where,
            units=column_units(table.units or ()),
            settings=best,
            tokens_from=table.tokens_from,
        )
    else:
        resolved, rows, tracker, frame = _points(
            study, options.root, on_the_way=options.unannealed, where=where
        )
    checked = check_points(frame, form, annealed=not options.unannealed, best=best)
    if options.drop_outliers:
        checked = drop_outliers(checked, law=law, delta=delta)
    said = {"runs_without_points": without_points(rows), "runs_met_to_rounding": to_rounding(rows)}
    about = [Note(code=code, text=text) for code, text in said.items() if text]
    with errors.status("fitting and resampling") as shown:
        document = fit_points(
            checked,
            law=law,
            delta=delta,
            reference=options.reference,
            asks=asks,
            about=about,
            progress=shown.update,
        )
    return _Fitted(checked, document, resolved, rows, tracker)


def _points(
    study: str, root: Path | None, *, on_the_way: bool = False, where: Sequence[str] = ()
) -> tuple[ResolvedStudy, list[RunStatus], Tracker | None, pd.DataFrame]:
    """Return a study as it was submitted, its rows, its tracker, and the table of its points."""
    from analysis.points.table import build_frame
    from harness.record.points import header_of, points_of, rows_of
    from harness.record.registry import registered
    from harness.submit.monitor import begun
    from harness.tracking.sync import bring_up_to_date

    resolved = registered(study, root)
    rows = begun(resolved)
    with errors.status("bringing MLflow up to date"):
        tracker = bring_up_to_date(resolved, rows)
    points = list(points_of(rows, resolved.root, on_the_way=on_the_way))
    frame = build_frame(
        header_of(points), list(enumerate(rows_of(points), 1)), f"study {resolved.study.name}", where
    )
    return resolved, rows, tracker, frame
