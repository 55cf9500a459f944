"""Steps that were timed: read from the journals of finished Runs, kept in the study's calibration.json.

What other studies under the same ROOT have kept counts too. Of each size its longest finished Runs are read, and not
again once calibration.json has them, so that planning reads a few journals and not ten thousand. What shared a GPU with
others tells nothing: how fast it went depends on what they did meanwhile, which nobody knows, and a plan wants to know
how fast it goes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from harness.journal import Event, read_progress
from harness.rundir import Layout, Root, read_model, write_atomically
from harness.speed import Calibration, StepTime, step_work
from harness.status import RunState, RunStatus
from ssmttm.errors import InputError

RUNS_A_SIZE = 3
"""Finished Runs of a size that are read, the longest: their steps are hundreds already."""


def read_calibration(root: Root, study_name: str) -> Calibration:
    """calibration.json of a study; empty where nothing has finished."""
    path = root.study(study_name) / "calibration.json"
    return read_model(path, Calibration) if path.exists() else Calibration()


def timed_steps(
    root: Root, study_name: str, rows: Sequence[RunStatus], text_positions: int
) -> list[StepTime]:
    """Every timed step known under ROOT: the study's own, what its journals add, and what other studies kept."""
    own = own_steps(root, study_name, rows, text_positions)
    return [*own, *_of_others(root, study_name)]


def own_steps(root: Root, study_name: str, rows: Iterable[RunStatus], text_positions: int) -> list[StepTime]:
    """What calibration.json holds and what finished Runs tell that it does not know of."""
    kept = list(read_calibration(root, study_name).steps)
    known = {run_id for step in kept for run_id in step.runs}
    done: dict[tuple[str, str], list[RunStatus]] = {}
    for row in rows:
        if row.state is RunState.DONE:
            done.setdefault((row.point.architecture, row.point.size), []).append(row)
    for members in done.values():
        longest = sorted(members, key=lambda row: -row.point.run.iterations)[:RUNS_A_SIZE]
        read = tuple(row.run_id for row in longest)
        if known.issuperset(read):
            continue
        timed = [step for row in longest if (step := _timed(root, row, text_positions)) is not None]
        if timed:
            middle = sorted(timed, key=lambda step: step.seconds)[len(timed) // 2]
            kept = [step for step in kept if not step.is_of(middle)]
            kept.append(middle.model_copy(update={"runs": read}))
    return kept


def write_calibration(root: Root, study_name: str, rows: Iterable[RunStatus], text_positions: int) -> None:
    """Keep what the study's finished Runs tell."""
    calibration = Calibration(steps=tuple(own_steps(root, study_name, rows, text_positions)))
    text = calibration.model_dump_json(indent=1, exclude_defaults=True) + "\n"
    write_atomically(root.study(study_name) / "calibration.json", text)


def _of_others(root: Root, study_name: str) -> list[StepTime]:
    found: list[StepTime] = []
    for path in sorted((root.path / "studies").glob("*/calibration.json")):
        if path.parent.name == study_name:
            continue
        try:
            found += read_model(path, Calibration).steps
        except InputError:
            continue  # that study's own verbs say so
    return found


def _timed(root: Root, row: RunStatus, text_positions: int) -> StepTime | None:
    """The median step of a finished Run, trunk and decay; None where its journals do not tell."""
    own = read_progress(root.run(row.run_id))
    if own.state != Event.FINISHED or own.started is None:
        return None
    trunk = read_progress(root.series(row.series_id))
    if any(span.gpu_share < 1 for span in (*trunk.spans, *own.spans)):
        return None
    layout = Layout.model_validate(
        {key: value for key, value in own.started.get("layout", {}).items() if key in Layout.model_fields}
    )
    # The first interval holds what is done once: caches, and memory that is asked for.
    events = [
        event
        for journal in (trunk, own)
        for step, event in sorted(journal.steps.items())
        if step > 1 and event.get("tokens_per_second", 0) > 0
    ]
    if not events:
        return None
    run = row.point.run
    tokens = run.batch * run.frames * run.model.n_codebooks
    device = str(own.started.get("device", "cpu")).split(":")[0]
    work = step_work(run, layout, text_positions, on_cuda=device == "cuda")
    return StepTime(
        architecture=row.point.architecture,
        size=row.point.size,
        device=device,
        device_name=own.started.get("device_name"),
        precision=run.precision,
        ranks=layout.ranks,
        threads=layout.threads,
        passes=work.passes,
        bytes=work.bytes,
        flops=work.flops,
        seconds=tokens / median(event["tokens_per_second"] for event in events),
    )
