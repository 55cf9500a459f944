"""MLflow as the shared view of a study: its journals are mirrored into an experiment, Series by Series.

The journals are the truth and training never waits for a tracker. A parent run is a Series with the trunk's metrics, a
child run a Run with its decay and its result, and one run of its own holds the study's files. Nothing is queued: what a
slow tracker has not got yet waits in the journals.

A ledger, mirrored.json, spares asking MLflow about every finished run: reading ten thousand of them back takes longer
than everything else a table of points needs. It says of each Series that is over what its journals looked like (files
and sizes) and which MLflow runs hold it; while that stands, there is nothing to send. It is valid for one store and one
experiment made at one time. It is never needed and never the truth: `ssmscale sync` mirrors thoroughly, asks the store
for everything, merges runs made twice, settles runs that are RUNNING though the study lists them no more, and writes
the ledger anew. A run that a user deleted in MLflow stays deleted, and is named.
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

from filelock import FileLock

from harness.common.disk import side_by_side, write_atomically
from harness.common.validation import first_line
from harness.record.journal import ProgressReader, read_progress
from harness.record.root import Root
from harness.record.status import RunState, RunStatus
from harness.study.run import by_series
from harness.tracking.experiment import KIND, REASON, SERIES, Artefacts, Experiment, Held, study_facts
from harness.tracking.metrics import (
    OVER,
    WAITING,
    may_live_elsewhere,
    milliseconds,
    status_of_study,
    status_of_unlisted,
)
from harness.tracking.series import Members, SeriesMirror, send_journal, survivor

SERVER_THREADS = 4
"""Series sent to a server at once. An SQLite file takes one writer at a time."""
MOST_REFUSED = 3
"""Series a store may refuse something of; one that refuses more takes nothing today."""
STUDY = "study"
"""Kind of the one run that holds a study's files."""


Tags = Callable[[RunStatus], Mapping[str, str]]
"""Tags of a Run's run, and of its Series', besides those that its journal gives."""


@dataclass
class Mirrored:
    """The outcome of one mirroring."""

    notes: list[str] = field(default_factory=list)
    """Notes to the user, a sentence each; a tracker gives each once."""
    merged: int = 0
    """Runs that were there more than once and are no more."""
    settled: int = 0
    """Runs that were RUNNING though the study lists them no more."""
    refused: int = 0
    """Series of which MLflow would not take something."""


class Tracker:
    """One study's experiment in an MLflow store; its methods raise whatever MLflow raises."""

    def __init__(self, uri: str, study_name: str, root: Root, tags_of: Tags = lambda _: {}) -> None:
        self.uri, self.study_name, self.root, self.tags_of = uri, study_name, root, tags_of
        note = (
            f"Scaling study {study_name}. A parent run is a series (the trunk its runs share), a child run one "
            "run (its decay and its result); the run of kind study holds the study, its plan and its newest report."
        )
        self.experiment = Experiment(uri, study_name, root.path / "mlflow-artifacts", note)
        self.artefacts = Artefacts(self.experiment)
        self.folder = root.study(study_name)
        self.ledger = MirrorLedger(
            self.folder / "mirrored.json", uri, self.experiment.id, self.experiment.made
        )
        self.visits = 0
        """Series visited so far: that mirroring gets on."""
        self._series: dict[str, tuple[SeriesMirror, ProgressReader]] = {}
        self._closed: set[str] = set()
        """Series of finished Runs alone that are in the ledger: nothing can happen to them any more."""
        self._study: list[Held] | None = None
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
        """Send what the journals have and MLflow has not; `settle` ends the runs of what nobody trains.

        `thorough` believes no ledger, and merges and settles whatever the experiment holds. `with_study` keeps the
        study's own run too, which a mirror of some of its Series leaves to others. Ends early once `stopped()`.
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
        if self.artefacts.problem is not None:
            self._note([self.artefacts.problem], done)
        return done

    def links(self) -> dict[str, str]:
        """Pages of the mirrored runs, by run id, where the store is a server."""
        if not self.experiment.is_server:
            return {}
        base = f"{self.uri.rstrip('/')}/#/experiments/{self.experiment.id}/runs"
        return {identity: f"{base}/{mlflow_id}" for identity, mlflow_id in self.mlflow_ids().items()}

    def mlflow_ids(self) -> dict[str, str]:
        """MLflow's run by run id, of all that is known to be there; none for one that was deleted or refused."""
        known = self.ledger.mlflow_ids()
        for series, _ in self._series.values():
            known |= series.mlflow_ids()
        return known

    def _is_open(self, series_id: str, rows: Sequence[RunStatus], *, settle: bool) -> bool:
        """True if a Series may have something to send; cheap where it has not begun or is over."""
        states = {row.state for row in rows}
        if series_id in self._closed or (states == {RunState.NEW} and not settle):
            return False
        if series_id in self._series or not self.ledger.holds(series_id, self._state(series_id, rows)):
            return True
        if states == {RunState.DONE}:
            self._closed.add(series_id)
        return False

    def _state(self, series_id: str, rows: Sequence[RunStatus]) -> str:
        folders = [self.root.series(series_id), *(self.root.run(row.run_id) for row in rows)]
        return state_of(folders, *((row.run_id, str(row.state)) for row in rows))

    def _visit(
        self, series_id: str, rows: Sequence[RunStatus], done: Mirrored, *, settle: bool, thorough: bool
    ) -> None:
        state = self._state(series_id, rows)  # before the journals are read: what is written later is news
        if series_id not in self._series:
            made = SeriesMirror(self.experiment, self.artefacts, self.root, series_id, self.tags_of)
            self._series[series_id] = (made, ProgressReader())
        series, reader = self._series[series_id]
        members = Members(
            series_id=series_id,
            rows=rows,
            trunk=reader.read(self.root.series(series_id)),
            own={row.run_id: reader.read(self.root.run(row.run_id)) for row in rows},
        )
        for identity, _ in members.begun:
            self._note(members.progress(identity).damaged, done)
        if members.begun:
            try:
                series.update(members, settle=settle, merge=thorough)
            except Exception as error:
                done.refused += 1
                if not _is_refusal(error) or done.refused > MOST_REFUSED:
                    raise
                self._note([f"series {series_id}: MLflow refuses it: {first_line(error)}"], done)
                return
        self._note(series.notes, done)
        done.merged, series.merged = done.merged + series.merged, 0
        states = {row.state for row in rows}
        elsewhere = any(may_live_elsewhere(members.progress(identity)) for identity, _ in members.begun)
        if states <= OVER or (settle and not states & WAITING and not elsewhere):
            self.ledger.close(series_id, state, series.mlflow_ids())
            del self._series[series_id]
            if states == {RunState.DONE}:
                self._closed.add(series_id)

    def _note(self, notes: Iterable[str], done: Mirrored) -> None:
        fresh = [note for note in notes if note not in self._noted]
        self._noted.update(fresh)
        done.notes += fresh

    def _visit_study(self, rows: Sequence[RunStatus], done: Mirrored, *, settle: bool) -> None:
        """Keep the study's files with one run, each as it is now, and say how the study stands."""
        wanted = status_of_study(rows, settle=settle) if rows else None
        if wanted is None:
            return
        facts = (study_facts(self.folder), wanted.status, wanted.reason)
        state = hashlib.sha256(repr(facts).encode()).hexdigest()
        if state == self._study_state or self.ledger.holds(STUDY, state):
            return
        held = self._study_run()
        if held is None:
            self._note(["the study's own run was deleted in MLflow and stays so"], done)
            return
        tags = self.artefacts.keep_files(held, self.folder)
        if wanted.reason is not None:
            tags[REASON] = wanted.reason
        try:
            self.experiment.send(held, (), tags=tags)
            same = held.status == wanted.status
            self.experiment.end(held, wanted.status, held.end if same else wanted.milliseconds)
        except Exception:
            self._study = None
            raise
        self._study_state = state
        if wanted.status != "RUNNING" and self.artefacts.problem is None:
            self.ledger.close(STUDY, state, {STUDY: held.mlflow_id})

    def _study_run(self) -> Held | None:
        """The study's run, made where there is none; None where it was deleted."""
        if not self._study:
            with FileLock(self.folder / "mlflow.lock"):
                self._study = list(self.experiment.search(KIND, STUDY))
                if not self._study:
                    events = self.root.control(self.study_name).read()
                    begun = milliseconds(events[0]["t"] if events else time.time())
                    name = self.study_name
                    self._study = [self.experiment.create(name, STUDY, name, begun, {})]
        return survivor(self._study)

    def _ask_for_everything(self, series_ids: Iterable[str], rows: Iterable[RunStatus]) -> list[Held]:
        """Clear the ledger and know every run of the experiment; returns those that the study does not list."""
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
            series = SeriesMirror(self.experiment, self.artefacts, self.root, series_id, self.tags_of)
            series.know(found.get(series_id, ()))
            self._series[series_id] = (series, ProgressReader())
        listed = {*series_ids, *(row.run_id for row in rows)}
        return [held for series in found.values() for held in series if held.identity not in listed]

    def _settle_unlisted(self, others: Iterable[Held], done: Mirrored) -> None:
        """End the runs that are RUNNING though no process trains them, as their journals say."""
        for held in others:
            if held.deleted or held.status != "RUNNING":
                continue
            place = self.root.series if held.kind == "series" else self.root.run
            progress = read_progress(place(held.identity))
            status = status_of_unlisted(progress)
            send_journal(self.experiment, held, progress, status, {}, {})
            done.settled += status is not None and status.status != "RUNNING"


def _is_refusal(error: Exception) -> bool:
    """True if the store answered and refused, as it does for a deleted run; not if it is ill or gone."""
    from mlflow.exceptions import MlflowException

    refusals = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "BAD_REQUEST"}
    return isinstance(error, MlflowException) and error.error_code in refusals


class MirrorLedger:
    """ROOT/studies/NAME/mirrored.json: which Series are in MLflow and over."""

    def __init__(self, path: Path, store: str, experiment: str, made: int) -> None:
        self.path = path
        # An address may hold a password.
        self._key = [hashlib.sha256(store.encode()).hexdigest(), experiment, made]
        self._closed: dict[str, tuple[str, dict[str, str]]] = {}
        self._changed = False
        self._read()

    def holds(self, identity: str, state: str) -> bool:
        """True if that Series (or the study's own run) was closed with its journals in that state."""
        return self._closed.get(identity, ("", {}))[0] == state

    def close(self, identity: str, state: str, mlflow_ids: Mapping[str, str]) -> None:
        """Note that everything of a Series is in MLflow, in which runs, by run id."""
        if self._closed.get(identity) != (state, dict(mlflow_ids)):
            self._closed[identity] = (state, dict(mlflow_ids))
            self._changed = True

    def clear(self) -> None:
        """Begin anew: everything is to be checked."""
        self._closed, self._changed = {}, True

    def mlflow_ids(self) -> dict[str, str]:
        """MLflow's run by identity, of everything closed."""
        return {
            identity: mlflow_id for _, ids in self._closed.values() for identity, mlflow_id in ids.items()
        }

    def save(self) -> None:
        """Write what has changed."""
        if self._changed:
            document = {"store": self._key, "closed": self._closed}
            write_atomically(self.path, json.dumps(document, separators=(",", ":")) + "\n")
            self._changed = False

    def _read(self) -> None:
        try:
            held: Any = json.loads(self.path.read_text(encoding="utf-8"))
            if held["store"] == self._key:
                self._closed = {
                    str(identity): (str(state), {str(key): str(value) for key, value in ids.items()})
                    for identity, (state, ids) in held["closed"].items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._closed = {}  # no ledger, or none that can be read: everything is asked about


def state_of(folders: Iterable[Path], *facts: object) -> str:
    """A digest of facts and of the files and sizes of journals and evaluations: another means that there is news."""
    digest = hashlib.sha256(repr(facts).encode())
    for folder in folders:
        try:
            with os.scandir(folder / "journal") as entries:
                files = sorted((entry.name, entry.stat().st_size) for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            files = []
        digest.update(repr(files).encode())
        if scores := sorted((path.name, path.stat().st_size) for path in folder.glob("evaluation/*.json")):
            digest.update(repr(scores).encode())
    return digest.hexdigest()[:16]
