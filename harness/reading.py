"""Where a study stands, read once or again and again: journals each time, the scheduler seldom.

A journal is a file on our own disk. slurmctld is one process that a whole site talks to, so it is asked at most every
twenty seconds and the less often the longer it took; in between, and while it does not answer, its last word holds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.dispatch.slurm_book import Book, jobs_of_runs, open_book
from harness.dispatch.slurm_queue import SchedulerGone
from harness.hours import Hours, times_of_jobs
from harness.pilots import Pilot, pilots_of
from harness.status import RunState, RunStatus, StatusReader, count_states
from harness.submission import ResolvedStudy

SCHEDULER_SECONDS = 20.0
"""Least time between two questions to the scheduler."""
PATIENCE = 20.0
"""How many times as long as an answer took nothing further is asked."""


@dataclass(frozen=True)
class Reading:
    """A study at one moment."""

    study: str
    rows: Sequence[RunStatus]
    hours: Hours
    notes: tuple[str, ...]
    """What was passed over in journals, a sentence each."""
    problem: str | None = None
    """Why the scheduler's word is old or missing."""
    is_unheard: bool = False
    """Whether the scheduler has been asked and has never answered."""
    pilots: tuple[Pilot, ...] = ()
    """Allocations in which Series of it are packed, that wait or run."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many Runs are in each state, states that occur alone."""
        return count_states(self.rows)

    @property
    def is_live(self) -> bool:
        """Whether anything is being trained or waits to be, or may be, for all that an unheard scheduler knows."""
        live = {RunState.RUNNING, RunState.QUEUED}
        if self.is_unheard:
            live |= {RunState.NEW, RunState.INTERRUPTED}
        return any(row.state in live for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """The document of `ssmscale status --json`."""
        rows = [row.as_json() | {"gpu_hours_left": self.hours.left[row.run_id]} for row in self.rows]
        return {
            "study": self.study,
            "runs": rows,
            "counts": self.counts,
            "gpu_hours": self.hours.as_json(),
            "allocations": [pilot.as_json() for pilot in self.pilots],
            "notes": list(self.notes),
        }


class StudyReader:
    """Reads one study."""

    def __init__(self, resolved: ResolvedStudy) -> None:
        self.resolved = resolved
        self._journals = StatusReader(resolved.root, resolved.study.name)
        self._folder = resolved.root.study(resolved.study.name)
        self._book: Book | None = None
        self._problem: str | None = None
        self._next = float("-inf")

    def read(self) -> Reading:
        """Where it stands now, by the scheduler's newest word."""
        self._ask()
        jobs = {} if self._book is None else jobs_of_runs(self._book)
        times = {} if self._book is None else times_of_jobs(self._book)
        rows = self._journals.read(self.resolved.points, jobs=jobs)
        hours = self._journals.hours(rows, times)
        return Reading(
            self.resolved.study.name,
            rows,
            hours,
            self._journals.notes,
            self._problem,
            is_unheard=self._problem is not None and (self._book is None or bool(self._book.unheard)),
            pilots=() if self._book is None else pilots_of(self._book, self._folder),
        )

    def _ask(self) -> None:
        begun = time.monotonic()
        if begun < self._next or not (self._folder / "arrays").is_dir():
            return
        try:
            self._book = open_book(self._folder)
            said = self._book.problem
            self._problem = f"{said}; the journals tell what is known" if said else None
        except SchedulerGone as gone:
            known = "the journals tell what is known" if self._book is None else "its last word holds"
            self._problem = f"SLURM: {gone}; {known}"
        now = time.monotonic()
        self._next = now + max(SCHEDULER_SECONDS, PATIENCE * (now - begun))
