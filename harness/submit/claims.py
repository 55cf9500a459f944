"""Who is to train a Series: a claim file made with O_EXCL, so that two submissions never hand over the same one.

A claim names the array of jobs it was made for. It ends when those jobs have, or when they turn out never to have
been submitted; whoever finds that takes the claim away by renaming it, which one process alone can do.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import ValidationError

from harness.common.disk import DISK_THREADS, drop_draft, naming_a_full_disk, side_by_side, sync_folder
from harness.common.process import identify_process
from harness.dispatch.base import Task
from harness.dispatch.ledger import Book, is_given_up, open_book
from harness.record.jobs import SchedulerUnavailable
from harness.record.root import Root
from harness.study.run import Frozen


class Claim(Frozen):
    """claim.json of a Series."""

    study: str
    """The study that claims it, by name."""
    array: str
    """Name of the array of jobs it was made for."""
    process: dict[str, Any]
    """Who made it, as process.identify_process says."""
    t: float
    """When it was made, seconds since 1970."""


NOBODYS = Claim(study="", array="", process={}, t=0.0)
"""What a damaged claim is read as."""


def make_claim(series_dir: Path, claim: Claim) -> bool:
    """Claim a Series; False where another claim is there. Raises DiskFull."""
    path = series_dir / "claim.json"
    draft = path.with_name(f".claim.{uuid.uuid4().hex[:8]}")
    try:
        with naming_a_full_disk(path), draft.open("x", encoding="utf-8") as file:
            file.write(claim.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # whole when it appears, and refused where there is one
        sync_folder(series_dir)
    except FileExistsError:
        return False
    finally:
        drop_draft(draft)
    return True


def read_claim(series_dir: Path) -> Claim | None:
    """The claim on a Series; a damaged one is nobody's."""
    try:
        return Claim.model_validate_json((series_dir / "claim.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        return NOBODYS


def drop_claim(series_dir: Path, claim: Claim) -> None:
    """Take a claim away that is over; nothing happens where another has come in its place."""
    path = series_dir / "claim.json"
    aside = path.with_name(f".claim.{uuid.uuid4().hex[:8]}")
    try:
        with naming_a_full_disk(path):
            path.rename(aside)
    except FileNotFoundError:
        return
    taken = NOBODYS
    with contextlib.suppress(ValidationError):
        taken = Claim.model_validate_json(aside.read_bytes())
    if taken != claim:  # somebody else dropped it first and claimed the Series: give it back
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


@dataclass
class Claims:
    """The claims on a ROOT's Series, judged by what schedulers say of the arrays they were made for."""

    root: Root
    books: dict[str, Book] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    judged: set[str] = field(default_factory=set)
    """Arrays for whose sake a study's Book was read again."""
    silence: SchedulerUnavailable | None = None
    """The last answer that failed: the scheduler is not waited for again by each of a thousand Series."""

    def take(self, series_id: str, claim: Claim) -> bool:
        """Claim a Series, in place of a claim that is over; False where somebody else has it."""
        folder = self.root.series(series_id)
        held = read_claim(folder)
        if held is not None:
            if self._holds(held, series_id):
                return False
            drop_claim(folder, held)
        return make_claim(folder, claim)

    def take_all(self, study_name: str, array: str, tasks: Sequence[Task]) -> list[Task]:
        """Claim the Series of these tasks for an array that is about to be written; returns those that are ours now."""
        claim = Claim(study=study_name, array=array, process=identify_process(), t=time.time())
        taking = side_by_side(
            partial(self.take, claim=claim), [task.series_id for task in tasks], DISK_THREADS
        )
        return [task for task, is_ours in zip(tasks, taking, strict=True) if is_ours]

    def held(self, series_ids: Sequence[str]) -> dict[str, str]:
        """Those of these Series that somebody has claimed, and is training or will, and for which study.

        Raises SchedulerUnavailable, saying for whose sake the scheduler is asked.
        """

        def holder(series_id: str) -> str | None:
            claim = read_claim(self.root.series(series_id))
            if claim is None:
                return None
            try:
                return claim.study if self._holds(claim, series_id) else None
            except SchedulerUnavailable as gone:
                arrays = self.root.study(claim.study) / "arrays"
                why = (
                    f"{gone}; a job of study {claim.study} may train series {series_id}: say the same again when "
                    f"{gone.scheduler} answers, or remove {arrays} if there is no such cluster any more"
                )
                raise SchedulerUnavailable(gone.scheduler, why, is_here=gone.is_here) from gone

        holders = side_by_side(holder, series_ids, DISK_THREADS)
        return {
            series_id: study
            for series_id, study in zip(series_ids, holders, strict=True)
            if study is not None
        }

    def _holds(self, claim: Claim, series_id: str) -> bool:
        if not claim.study:
            return False
        if claim.array in (book := self._book(claim.study)).arrays:
            return book.holds(claim.array, series_id)
        if is_in_hand(claim):
            return True
        # Whoever is gone now may have claimed, submitted and ended since the Book was read.
        return self._book_after(claim).holds(claim.array, series_id)

    def _book(self, study_name: str) -> Book:
        with self.lock:  # Series are claimed side by side, and the scheduler is asked once
            if study_name not in self.books:
                self._read(study_name)
            return self.books[study_name]

    def _book_after(self, claim: Claim) -> Book:
        """The Book of a study, read after the submission that made a claim was gone; once for each array."""
        with self.lock:
            if claim.array not in self.judged:
                self._read(claim.study)
                self.judged.add(claim.array)
            return self.books[claim.study]

    def _read(self, study_name: str) -> None:
        if self.silence is not None:
            raise self.silence
        try:
            self.books[study_name] = open_book(self.root.study(study_name))
        except SchedulerUnavailable as gone:
            self.silence = gone
            raise


def is_in_hand(claim: Claim) -> bool:
    """Whether a claim without an array may belong to a submission that is about to write it."""
    return not is_given_up(claim.process, claim.t)
