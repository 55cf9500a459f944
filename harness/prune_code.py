"""Which copies of the code a study still needs: those that a job of its own in SLURM runs from, or soon will."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.dispatch.base import JobState
from harness.dispatch.slurm_book import open_book
from harness.dispatch.slurm_queue import SchedulerGone

COPY = re.compile(r"\.?([0-9a-f]{12})(\.[0-9a-f]{8})?")
"""A copy, or the draft of one that a killed submission left."""
FRESH_SECONDS = 3600.0
"""Time a submission has between asking for a copy and being known to SLURM."""


@dataclass(frozen=True)
class JudgedCopy:
    """One copy of the code, and whether it stays."""

    path: Path
    stays: bool
    why: str


def judge_copies(study_dir: Path) -> Iterator[JudgedCopy]:
    """Every copy of a study's code; where SLURM does not answer, all that jobs ever ran from stay."""
    folder = study_dir / "code"
    copies = sorted(path for path in folder.glob("*") if path.is_dir() and COPY.fullmatch(path.name))
    if not copies:
        return
    try:
        book, unknown = open_book(study_dir), None
    except SchedulerGone as gone:
        book, unknown = None, f"whether a job needs it is not known: {gone}"
    needed = set()
    if book is not None:
        live = {JobState.QUEUED, JobState.RUNNING}
        needed = {
            array.copy_of_code
            for array, _, _, view in book.elements()
            if view is not None and view.state in live
        } | {
            array.copy_of_code
            for array in book.arrays.values()
            if (array.job_id is None and not array.is_void) or array.name in book.elsewhere
        }
    for path in copies:
        if time.time() - path.stat().st_mtime < FRESH_SECONDS:
            yield JudgedCopy(path, True, "asked for within the last hour")
        elif path.name.startswith("."):
            yield JudgedCopy(path, False, "never completed")
        elif unknown is not None:
            yield JudgedCopy(path, True, unknown)
        elif path.name in needed:
            yield JudgedCopy(path, True, "a job in SLURM runs from it")
        else:
            yield JudgedCopy(path, False, "no job runs from it any more")
