"""The mirror of a study's journals in an MLflow experiment.

A parent run is a Series with the trunk's metrics, a child run a Run with its decay and its result, and a run of kind
study holds the study's files. There is no queue: the journals hold whatever a slow tracker still lacks.

A ledger, mirrored.json, names the Series that are finished and mirrored, with a digest of their journals' names and
sizes: reading ten thousand runs back from MLflow would take longer than the rest of a table of points. It is valid for
one experiment in one store. `ssmscale sync` ignores it: it reads the whole experiment, merges runs created twice,
settles RUNNING runs that the study no longer lists, and writes the ledger anew. A run that a user deleted in MLflow
stays deleted and is named in a note.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.common.address import without_login
from harness.common.disk import side_by_side, write_atomically
from harness.common.validation import first_line
from harness.record.journal import read_progress
from harness.record.root import Root
from harness.record.status import RunState, RunStatus
from harness.study.run import by_series
from harness.tracking.experiment import KIND, REASON, SERIES, Experiment, Held, study_facts
from harness.tracking.metrics import (
    WAITING,
    may_live_elsewhere,
    milliseconds,
    status_of_study,
    status_of_unlisted,
)
from harness.tracking.series import SeriesMirror, send_journal, survivor
from ssmttm.files import parse_json, read_document
from ssmttm.locks import file_lock

SERVER_THREADS = 4
"""Series sent to a server at once. An SQLite file takes one writer at a time."""
MOST_REFUSED = 3
"""Refused Series after which a mirroring gives up."""
STUDY = "study"
"""Kind of the run that holds the study's files."""

Tags = Callable[[RunStatus], Mapping[str, str]]
"""Gives the additional tags of a Run and of its Series."""


@dataclass
class Mirrored:
    """The outcome of one mirroring."""

    notes: list[str] = field(default_factory=list)
    """Notes to the user, a sentence each; a tracker gives each once."""
    merged: int = 0
    """Superfluous copies of runs that were deleted."""
    settled: int = 0
    """RUNNING runs that were ended because the study no longer lists them."""
    refused: int = 0
    """Series of which MLflow refused something."""


class Tracker:
    """One study's experiment in an MLflow store; its methods raise MLflow's exceptions."""

    def __init__(self, uri: str, study_name: str, root: Root, tags_of: Tags = lambda _: {}) -> None:
        self.uri, self.study_name, self.root, self.tags_of = uri, study_name, root, tags_of
        note = (
            f"Scaling study {study_name}. A parent run is a series (the trunk its runs share), a child run one "
            "run (its decay and its result); the run of kind study holds the study, its plan and its newest report."
        )
        self.experiment = Experiment(uri, study_name, root.path / "mlflow-artifacts", note)
        self.folder = root.study(study_name)
        self.ledger = MirrorLedger(self.folder / "mirrored.json", uri, self.experiment)
        self.visits = 0
        """Series visited so far."""
        self._series: dict[str, SeriesMirror] = {}
        self._closed: set[str] = set()
        """Series of the ledger whose Runs have all finished: they cannot change any more."""
        self._study: list[Held] = []
        self._study_state = ""
        self._noted: set[str] = set()

    def mirror(
        self,
        rows: Sequence[RunStatus],
        *,
        settle: bool = False,
        thorough: bool = False,
        with_study: bool = True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Mirrored:
        """Send MLflow what it lacks of the journals; `settle` also ends the runs that no process trains.

        `thorough` ignores the ledger, and merges and settles all runs of the experiment. `with_study` updates the run
        of kind study; a mirror of some Series alone does not. Ends early once `stopped()` is true.
        """
        done = Mirrored()
        series_rows = by_series(rows)
        others = self._ask_for_everything(series_rows, rows) if thorough else []

        def visit(series: tuple[str, list[RunStatus]]) -> None:
            if not stopped():
                self._visit(*series, done, settle=settle, thorough=thorough)
                self.visits += 1

        try:
            pending = (item for item in series_rows.items() if self._is_open(*item, settle=settle))
            if self.experiment.is_server:
                side_by_side(visit, pending, SERVER_THREADS)
            else:
                for item in pending:
                    visit(item)
            if with_study and not stopped():
                self._visit_study(rows, done, settle=settle)
            if not stopped():
                self._settle_unlisted(others, done)
        finally:
            self.ledger.save()
        if self.experiment.files_problem is not None:
            self._note([self.experiment.files_problem], done)
        return done

    def links(self) -> dict[str, str]:
        """Return the pages of the mirrored runs by run id; empty unless the store is a server."""
        if not self.experiment.is_server:
            return {}
        base = f"{without_login(self.uri).rstrip('/')}/#/experiments/{self.experiment.id}/runs"
        return {identity: f"{base}/{mlflow_id}" for identity, mlflow_id in self.mlflow_ids().items()}

    def mlflow_ids(self) -> dict[str, str]:
        """Return MLflow's run by run id, without runs that were deleted or refused."""
        known = self.ledger.mlflow_ids()
        for series in self._series.values():
            known |= series.mlflow_ids()
        return known

    def _is_open(self, series_id: str, rows: Sequence[RunStatus], *, settle: bool) -> bool:
        """True if a Series may have something to send."""
        states = {row.state for row in rows}
        if series_id in self._closed or (states == {RunState.NEW} and not settle):
            return False
        if series_id in self._series or not self.ledger.holds(series_id, self._state(series_id, rows)):
            return True
        if states == {RunState.DONE}:
            self._closed.add(series_id)
        return False

    def _state(self, series_id: str, rows: Sequence[RunStatus]) -> str:
        """Return a digest that changes with a row's state and with names and sizes of journals and evaluations."""
        digest = hashlib.sha256(repr(tuple((row.run_id, str(row.state)) for row in rows)).encode())
        for folder in (self.root.series(series_id), *(self.root.run(row.run_id) for row in rows)):
            try:
                with os.scandir(folder / "journal") as entries:
                    files = sorted((entry.name, entry.stat().st_size) for entry in entries)
            except (FileNotFoundError, NotADirectoryError):
                files = []
            digest.update(repr(files).encode())
            scores = sorted((path.name, path.stat().st_size) for path in folder.glob("evaluation/*.json"))
            if scores:
                digest.update(repr(scores).encode())
        return digest.hexdigest()[:16]

    def _visit(
        self, series_id: str, rows: Sequence[RunStatus], done: Mirrored, *, settle: bool, thorough: bool
    ) -> None:
        state = self._state(
            series_id, rows
        )  # before reading the journals: lines written later must change it
        series = self._series.get(series_id) or self._add_series(series_id)
        series.read(rows)
        begun = [series.journals[identity] for identity, _ in series.begun]
        for progress in begun:
            self._note(progress.damaged, done)
        if begun:
            try:
                series.update(settle=settle, merge=thorough)
            except Exception as error:
                done.refused += 1
                if not _is_refusal(error) or done.refused > MOST_REFUSED:
                    raise
                self._note([f"series {series_id}: MLflow refuses it: {first_line(error)}"], done)
                return
        self._note(series.notes, done)
        done.merged, series.merged = done.merged + series.merged, 0
        states = {row.state for row in rows}
        elsewhere = any(map(may_live_elsewhere, begun))
        if states <= {RunState.DONE, RunState.FAILED} or (settle and not states & WAITING and not elsewhere):
            self.ledger.close(series_id, state, series.mlflow_ids())
            del self._series[series_id]
            if states == {RunState.DONE}:
                self._closed.add(series_id)

    def _add_series(self, series_id: str) -> SeriesMirror:
        series = SeriesMirror(self.experiment, self.root, series_id, self.tags_of)
        self._series[series_id] = series
        return series

    def _note(self, notes: Iterable[str], done: Mirrored) -> None:
        fresh = [note for note in notes if note not in self._noted]
        self._noted.update(fresh)
        done.notes += fresh

    def _visit_study(self, rows: Sequence[RunStatus], done: Mirrored, *, settle: bool) -> None:
        """Send the study's files and its status to the run of kind study."""
        wanted = status_of_study(rows, settle=settle) if rows else None
        if wanted is None:
            return
        facts = (study_facts(self.folder), wanted.status, wanted.reason)
        state = hashlib.sha256(repr(facts).encode()).hexdigest()
        if state == self._study_state or self.ledger.holds(STUDY, state):
            return
        held = self._study_run()
        if held is None:
            self._note(["the run of kind study was deleted in MLflow and is not mirrored"], done)
            return
        tags = self.experiment.send_files(held, self.folder)
        if wanted.reason is not None:
            tags[REASON] = wanted.reason
        try:
            self.experiment.send(held, (), tags=tags)
            same = held.status == wanted.status
            self.experiment.end(held, wanted.status, held.end if same else wanted.milliseconds)
        except Exception:
            self._study = []
            raise
        self._study_state = state
        if wanted.status != "RUNNING" and self.experiment.files_problem is None:
            self.ledger.close(STUDY, state, {STUDY: held.mlflow_id})

    def _study_run(self) -> Held | None:
        """Return the run of kind study, created if there is none; None if it was deleted."""
        if not self._study:
            with file_lock(self.folder / "mlflow.lock"):
                self._study = list(self.experiment.search(KIND, STUDY))
                if not self._study:
                    events = self.root.control(self.study_name).read()
                    begun = milliseconds(events[0]["t"] if events else time.time())
                    name = self.study_name
                    self._study = [self.experiment.create(name, STUDY, name, begun, {})]
        return survivor(self._study)

    def _ask_for_everything(self, series_ids: Iterable[str], rows: Iterable[RunStatus]) -> list[Held]:
        """Clear the ledger and search the whole experiment; return the runs that the study does not list."""
        self.ledger.clear()
        self._closed.clear()
        self._series.clear()
        self._study, self._study_state = [], ""
        found: dict[str, list[Held]] = {}
        for held in self.experiment.search():
            if held.kind == STUDY:
                self._study.append(held)
            else:
                found.setdefault(held.tags.get(SERIES, ""), []).append(held)
        for series_id in series_ids:
            self._add_series(series_id).know(found.get(series_id, ()))
        listed = {*series_ids, *(row.run_id for row in rows)}
        return [held for series in found.values() for held in series if held.identity not in listed]

    def _settle_unlisted(self, others: Iterable[Held], done: Mirrored) -> None:
        """End the RUNNING runs that no process trains, with the status their journals give."""
        for held in others:
            if held.deleted or held.status != "RUNNING":
                continue
            place = self.root.series if held.kind == "series" else self.root.run
            progress = read_progress(place(held.identity))
            status = status_of_unlisted(progress)
            send_journal(self.experiment, held, progress, status, {}, {})
            done.settled += status is not None and status.status != "RUNNING"


def _is_refusal(error: Exception) -> bool:
    """True if the store refused the request, as it does for a deleted run; False if it failed or is unreachable."""
    from mlflow.exceptions import MlflowException

    refusals = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "BAD_REQUEST"}
    return isinstance(error, MlflowException) and error.error_code in refusals


class MirrorLedger:
    """ROOT/studies/NAME/mirrored.json: the finished Series that MLflow holds completely."""

    def __init__(self, path: Path, store: str, experiment: Experiment) -> None:
        self.path = path
        # A digest, since the address may hold a password.
        self._key = [hashlib.sha256(store.encode()).hexdigest(), experiment.id, experiment.made]
        self._closed: dict[str, tuple[str, dict[str, str]]] = {}
        self._changed = False
        try:
            held: Any = parse_json(read_document(path))
            if held["store"] == self._key:
                self._closed = {
                    str(identity): (str(state), {str(key): str(value) for key, value in ids.items()})
                    for identity, (state, ids) in held["closed"].items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no ledger, or a damaged one: every Series is checked

    def holds(self, identity: str, state: str) -> bool:
        """True if that Series, or the study, was closed with its journals in that state."""
        return self._closed.get(identity, ("", {}))[0] == state

    def close(self, identity: str, state: str, mlflow_ids: Mapping[str, str]) -> None:
        """Record that MLflow holds a Series completely, with MLflow's runs by run id."""
        if self._closed.get(identity) != (state, dict(mlflow_ids)):
            self._closed[identity] = (state, dict(mlflow_ids))
            self._changed = True

    def clear(self) -> None:
        """Forget every Series."""
        self._closed, self._changed = {}, True

    def mlflow_ids(self) -> dict[str, str]:
        """Return MLflow's run by identity, of everything closed."""
        return {
            identity: mlflow_id for _, ids in self._closed.values() for identity, mlflow_id in ids.items()
        }

    def save(self) -> None:
        """Write the file if something has changed."""
        if self._changed:
            document = {"store": self._key, "closed": self._closed}
            write_atomically(self.path, json.dumps(document, separators=(",", ":")) + "\n")
            self._changed = False
