"""The allocations in which a study's Series are packed: where they stand, and where Ray's dashboard is meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.dispatch.arrays import Array, packed_folder
from harness.dispatch.base import JobState
from harness.dispatch.slurm_book import Book
from harness.dispatch.slurm_queue import JobView
from harness.dispatch.slurm_words import explain
from harness.ray_cluster import RayAddress, read_address
from harness.tables import duration
from harness.terminal import counted


@dataclass(frozen=True)
class Pilot:
    """A packed array's job that waits or runs."""

    array: Array
    view: JobView
    ray: RayAddress | None
    """Where its Ray is, once it has started."""

    def as_json(self) -> dict[str, Any]:
        """A row of `allocations` in `ssmscale status --json`."""
        shape = self.array.shape
        return {
            "job_id": self.view.job_id,
            "state": self.view.state,
            "slurm_state": self.view.slurm_state,
            "reason": self.view.reason,
            "nodes": shape.nodes,
            "gpus": shape.ranks,
            "series": len(self.array.tasks),
            "node_list": self.view.nodes or None,
            "seconds": self.view.seconds,
            "dashboard": self.ray.dashboard if self.ray else None,
            "tunnel": self.ray.tunnel() if self.ray else None,
            "token_file": str(self.ray.token_file) if self.ray else None,
        }

    def lines(self) -> Iterable[str]:
        """What a user wants to know of it."""
        shape, view = self.array.shape, self.view
        each = " each" if shape.nodes > 1 else ""
        size = f"{counted(shape.nodes, 'node')} with {counted(shape.ranks_a_node, self.array.device)}{each}"
        what = f"job {view.job_id}: {counted(len(self.array.tasks), 'series')} packed on {size}"
        if view.state is JobState.QUEUED:
            yield f"{what}, queued: {explain(view.reason or '')}"
            return
        yield f"{what}, {view.slurm_state.lower()} for {duration(view.seconds / 3600)} on {view.nodes}"
        if self.ray is not None and self.ray.dashboard is not None:
            page, token = self.ray.dashboard, self.ray.token_file
            yield f"Ray's dashboard: {self.ray.tunnel()}, then {page} with what is in {token}"


def pilots_of(book: Book, study_dir: Path) -> tuple[Pilot, ...]:
    """The packed arrays of a study whose jobs wait or run, oldest first."""
    found = []
    for array in book.arrays.values():
        view = book.job_of(array, 0) if array.packed else None
        if view is None or view.state not in {JobState.QUEUED, JobState.RUNNING}:
            continue
        ray = None
        if view.state is JobState.RUNNING:
            with contextlib.suppress(OSError, ValidationError):  # damaged, or not ours to read
                ray = read_address(packed_folder(study_dir, array.name) / "ray.json")
        found.append(Pilot(array, view, ray))
    return tuple(found)
