"""Scores of Runs by tasks: which prompts are left, the order of a task, and what is known of each Run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from harness.evaluate.evaluator import Evaluator
from harness.evaluate.part import ScoresOrder
from harness.evaluate.request import CorpusOfRuns, Evaluated, Request
from harness.evaluate.sharing import Block, Slice, batch_seconds, blocks_of
from harness.evaluate.tasks import LIVE_PARTS, Ended, Whole
from harness.plan.cluster import Cluster
from harness.record.registry import ResolvedStudy
from harness.record.status import RunStatus
from harness.submit.parts import PartState, PartStatus
from ssmttm.files import canonical_json

FOLDER = "evaluate"
"""Folder below a study's directory with the jobs and parts of its evaluations."""


def everywhere(request: Request) -> Request:
    """Return a request whose files are named by absolute paths, for workers that start elsewhere."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).absolute()) if name is not None and Path(name).exists() else name

    return replace(
        request,
        prompts=None if request.prompts is None else request.prompts.absolute(),
        reference=None if request.reference is None else request.reference.absolute(),
        clap=absolute(request.clap),
        tagger=absolute(request.tagger),
    )


def places(resolved: ResolvedStudy, request: Request) -> dict[str, Path]:
    """Return the paths that the tasks of an evaluation need, by the names that the user knows."""
    names = {
        "--prompts": request.prompts,
        "--reference": request.reference,
        "--clap": request.clap,
        "--tagger": request.tagger,
    }
    given = {name: Path(value) for name, value in names.items() if value is not None}
    return {**resolved.places, **{name: path for name, path in given.items() if path.exists()}}


def whole_of(resolved: ResolvedStudy, evaluator: Evaluator, *, only_finished: bool = False) -> Whole:
    """Return the evaluation of a study's Runs as a work that tasks share."""
    settings = evaluator.settings.digest
    facts = [settings, *sorted(one.key for one in evaluator.measures)]
    digest = hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:12]

    encoder = Path(resolved.study.text.encoder)
    needs = (encoder.absolute(),) if encoder.is_dir() else ()

    def order(slices: Sequence[Slice]) -> dict[str, object]:
        return ScoresOrder(
            whole=digest,
            root=resolved.root.path.absolute(),
            corpus=CorpusOfRuns.of(resolved),
            request=replace(everywhere(evaluator.request), device="cpu"),
            settings=settings,
            slices=tuple(slices),
            needs=needs,
            only_finished=only_finished,
        ).model_dump(mode="json")

    return Whole(resolved.root.study(resolved.study.name) / FOLDER, digest, order)


def blocks_left(evaluator: Evaluator, rows: Sequence[RunStatus], cluster: Cluster) -> list[Block]:
    """Return the blocks of the Runs without all results."""
    n, request = evaluator.settings.n_prompts, evaluator.request
    guided = 1 if request.guidance in {0, 1} else 2
    found: list[Block] = []
    for row in rows:
        if not evaluator.is_evaluated(row.run_id):
            model = row.point.run.model
            seconds = batch_seconds(model, evaluator.frames, guided * min(n, request.batch), cluster)
            found += blocks_of(row.run_id, n, request.batch, seconds)
    return found


def evaluated_by(
    evaluator: Evaluator, rows: Sequence[RunStatus], known: Sequence[str], ended: Ended
) -> list[Evaluated]:
    """Return what became of each Run; `known` are those that had all results before."""
    jobs, before = ended.jobs_by_run(), set(known)

    def become(run_id: str) -> Evaluated:
        if evaluator.is_evaluated(run_id):
            outcome: Literal["kept", "evaluated"] = "kept" if run_id in before else "evaluated"
            return Evaluated(run_id, outcome, notes=evaluator.notes_of(run_id))
        return _waiting(run_id, ended.held.by_run.get(run_id, []), jobs.get(run_id), ended.waiting)

    return [become(row.run_id) for row in rows]


def _waiting(run_id: str, states: Sequence[PartStatus], job: str | None, waiting: int) -> Evaluated:
    """Return what is known of a Run without all results; `job` is the one that was submitted for it now."""
    failed = [one.reason or "no reason is known" for one in states if one.state is PartState.FAILED]
    live = [one for one in states if one.state in LIVE_PARTS]
    if running := [one for one in live if one.state is PartState.RUNNING]:
        return Evaluated(run_id, "running", f"job {running[0].job_id}" if running[0].job_id else None)
    if live:
        why = f": {live[0].reason}" if live[0].reason else ""
        return Evaluated(run_id, "queued", f"job {live[0].job_id}{why}")
    if job is not None:
        before = f"; before, it failed: {failed[-1]}" if failed else ""
        return Evaluated(run_id, "queued", f"job {job}{before}")
    if failed:
        return Evaluated(run_id, "failed", failed[-1])
    if waiting:
        return Evaluated(run_id, "new", "its task is not submitted yet")
    return Evaluated(run_id, "failed", "its task ended without results; repeat the command")
