"""Evaluate Runs, or generate sound files, by tasks of a backend: here, or by jobs that outlive the command.

The same command can be given again at any time. Prompts that a live job has are left to it, what is done stays, and
the rest is shared anew among tasks: a task is named after all that it does, so the same share is the same task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

from harness.common.disk import make_folder
from harness.common.format import Estimate
from harness.dispatch.arrays import ArrayStore
from harness.dispatch.base import Backend, Handle
from harness.dispatch.part import PARTS, Part
from harness.evaluate.sharing import START_SECONDS, UNCERTAIN, Block, Slice, joined, share_out
from harness.plan.cluster import Cluster
from harness.record.jobs import JobView, SchedulerUnavailable
from harness.record.journal import Event, read_progress
from harness.submit.parts import (
    PartState,
    PartStatus,
    hand_over_parts,
    live_jobs,
    run_parts,
    states_of_parts,
)
from ssmttm.files import canonical_json
from ssmttm.locks import file_lock

T = TypeVar("T")
LIVE_PARTS = frozenset({PartState.QUEUED, PartState.RUNNING})


@dataclass(frozen=True)
class Whole:
    """A work that tasks share."""

    jobs_dir: Path
    """Folder of its jobs and parts."""
    digest: str
    """Digest of what decides its results; the order of each of its tasks has it as `whole`."""
    order: Callable[[Sequence[Slice]], dict[str, Any]]
    """Return the order of a task that does these prompts."""

    def parts(self) -> list[Part]:
        """Return the parts that were submitted to schedulers, oldest first, each once, with the jobs they wait for."""
        found: dict[str, Part] = {}
        for array in ArrayStore(self.jobs_dir).read().values():
            for task in array.tasks:
                if isinstance(task, Part) and json.loads(task.request).get("whole") == self.digest:
                    found[task.series_id] = task.model_copy(update={"after": array.after})
        return list(found.values())


def slices_of(part: Part) -> list[Slice]:
    """Return the prompts of a part."""
    return [Slice.model_validate(one) for one in json.loads(part.request)["slices"]]


def by_run(items: Iterable[T], part_of: Callable[[T], Part]) -> dict[str, list[T]]:
    """Return the items whose part has prompts of a Run, by Run."""
    found: dict[str, list[T]] = {}
    for item in items:
        for run_id in dict.fromkeys(one.run_id for one in slices_of(part_of(item))):
            found.setdefault(run_id, []).append(item)
    return found


@dataclass(frozen=True)
class Held:
    """Tasks of a work that are known, with their states."""

    states: Sequence[PartStatus]
    """State of each part that was submitted to a scheduler, oldest first."""

    @cached_property
    def by_run(self) -> dict[str, list[PartStatus]]:
        """States of the parts with prompts of each Run."""
        return by_run(self.states, lambda status: status.part)

    def prompts(self, jobs: Mapping[str, str]) -> dict[str, set[int]]:
        """Return the prompts of each Run that live tasks have; `jobs` are those that still train Runs, by Run.

        A task leaves out a Run that is not finished when it begins, so it has those alone for whose job it waits.
        """
        found: dict[str, set[int]] = {}
        for status in self.states:
            if status.state in LIVE_PARTS:
                for one in slices_of(status.part):
                    if one.run_id not in jobs or jobs[one.run_id] in status.part.after:
                        found.setdefault(one.run_id, set()).update(one.prompts)
        return found


def held_by_jobs(whole: Whole, *, may_be_silent: bool = False) -> Held:
    """Return the states of a work's parts; raises SchedulerUnavailable unless the scheduler `may_be_silent`."""
    jobs: Mapping[str, JobView] = {}
    try:
        jobs = live_jobs(whole.jobs_dir)
    except SchedulerUnavailable:
        if not may_be_silent:
            raise
    return Held(states_of_parts(whole.parts(), whole.jobs_dir, jobs))


def make_parts(
    whole: Whole,
    blocks: Sequence[Block],
    held: Held,
    cluster: Cluster,
    count: int | None = None,
    jobs: Mapping[str, str] = MappingProxyType({}),
) -> list[Part]:
    """Share the blocks that no live job has among so many parts.

    `jobs` are those that still train Runs, by Run: the parts begin when these are over.
    """
    theirs = held.prompts(jobs)
    free = [
        block for block in blocks if not set(block.prompts.prompts) <= theirs.get(block.prompts.run_id, set())
    ]
    threads = max(1, cluster.cores // cluster.gpus) if cluster.gpus else 1
    parts = []
    for share in share_out(free, count) if free else ():
        order = whole.order(joined(share))
        seconds = START_SECONDS + sum(block.seconds for block in share)
        hours = Estimate(seconds / UNCERTAIN, seconds, seconds * UNCERTAIN) * (1 / 3600)
        parts.append(
            Part.of(
                _folder(whole.jobs_dir, order),
                "evaluation",
                order,
                threads=threads,
                seconds=seconds,
                hours=hours,
                on_gpu=cluster.gpus > 0,
                label="evaluation",
                after=tuple(dict.fromkeys(jobs.values())),
            )
        )
    return parts


def _folder(jobs_dir: Path, order: Mapping[str, Any]) -> Path:
    """Return the folder of a new part: that of an earlier part of the same order, unless that one is finished.

    The results of a finished part may have been removed since.
    """
    name = hashlib.sha256(canonical_json(dict(order)).encode()).hexdigest()[:12]
    number, folder = 1, jobs_dir.absolute() / PARTS / name
    while read_progress(folder).state == Event.FINISHED:
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder


class Ended(NamedTuple):
    """Result of giving a work to tasks."""

    handles: list[Handle]
    """Tasks that were submitted to a scheduler now."""
    waiting: int
    """Number of tasks that the backend does not admit now."""
    held: Held
    """State of the tasks: here when all have ended, on a scheduler before tasks were submitted."""

    def jobs_by_run(self) -> dict[str, str]:
        """Return the job of the first task that was submitted now for each Run."""
        found = by_run(self.handles, lambda handle: cast("Part", handle.task))
        return {run_id: handles[0].job_id for run_id, handles in found.items()}


def do_here(
    whole: Whole,
    blocks: Sequence[Block],
    backend: Backend,
    cluster: Cluster,
    count: int | None,
    on_progress: Callable[[Sequence[PartStatus]], None],
) -> Ended:
    """Do what no live job has by tasks of a backend that ends with this process; raises as `run_parts`."""
    held = held_by_jobs(whole, may_be_silent=True)
    parts = make_parts(whole, blocks, held, cluster, count)
    live = [one for one in held.states if one.state in LIVE_PARTS]
    ended = run_parts(parts, backend, whole.jobs_dir, on_progress) if parts else []
    return Ended([], 0, Held([*live, *ended]))


def hand_over(
    whole: Whole,
    blocks: Sequence[Block],
    backend: Backend,
    cluster: Cluster,
    count: int | None = None,
    jobs: Mapping[str, str] = MappingProxyType({}),
) -> Ended:
    """Submit tasks for what no live job has; `jobs` as in `make_parts`. Raises SchedulerUnavailable."""
    make_folder(whole.jobs_dir)
    with file_lock(whole.jobs_dir / "plan.lock"):
        held = held_by_jobs(whole)
        parts = make_parts(whole, blocks, held, cluster, count, jobs)
        if not parts:
            return Ended([], 0, held)
        done = hand_over_parts(parts, backend, whole.jobs_dir)
    return Ended(done.handles, done.waiting, held)
