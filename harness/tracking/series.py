"""One Series in MLflow: a run for the Series and one for each of its Runs.

A lock beside the Series lets mirrors on one disk create each run once. Mirrors on different disks may create copies:
every host uses the oldest, and a thorough mirroring deletes the others once the oldest has everything.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from harness.record.journal import Progress, ProgressReader
from harness.record.root import Root
from harness.record.status import RunStatus
from harness.tracking.experiment import PARENT, REASON, SERIES, Experiment, Held
from harness.tracking.metrics import (
    MlflowStatus,
    evaluation_metrics,
    measured,
    milliseconds,
    status_of_run,
    status_of_series,
)
from ssmttm.locks import file_lock


class SeriesMirror:
    """The journals of one Series and its runs in MLflow, kept until the Series is over."""

    def __init__(
        self,
        experiment: Experiment,
        root: Root,
        series_id: str,
        tags_of: Callable[[RunStatus], Mapping[str, str]],
    ) -> None:
        self.experiment, self.root, self.series_id, self.tags_of = experiment, root, series_id, tags_of
        self._reader = ProgressReader()
        self.rows: Sequence[RunStatus] = ()
        self.journals: dict[str, Progress] = {}
        """Journals of the Series and of its Runs, by identity."""
        self.held: dict[str, list[Held]] | None = None
        """MLflow's runs by identity; None before a search."""
        self.notes: list[str] = []
        self.merged = 0

    @property
    def begun(self) -> list[tuple[str, str]]:
        """(identity, kind) of everything with a journal, the Series first; empty before any."""
        runs = [(row.run_id, "run") for row in self.rows if self.journals[row.run_id].attempt]
        return [(self.series_id, "series"), *runs] if runs or self.journals[self.series_id].attempt else []

    def read(self, rows: Sequence[RunStatus]) -> None:
        """Read the journals of the Series and of its Runs."""
        self.rows = rows
        self.journals = {row.run_id: self._reader.read(self.root.run(row.run_id)) for row in rows}
        self.journals[self.series_id] = self._reader.read(self.root.series(self.series_id))

    def know(self, found: Iterable[Held]) -> dict[str, list[Held]]:
        """Replace `held` by the result of a search."""
        held: dict[str, list[Held]] = {}
        self.held = held
        for one in found:
            held.setdefault(one.identity, []).append(one)
        return held

    def mlflow_ids(self) -> dict[str, str]:
        """Return MLflow's run by identity."""
        survivors = {identity: survivor(found) for identity, found in (self.held or {}).items()}
        return {identity: held.mlflow_id for identity, held in survivors.items() if held is not None}

    def update(self, *, settle: bool, merge: bool) -> None:
        """Send MLflow everything it lacks; raises MLflow's exceptions."""
        try:
            self._update(settle=settle, merge=merge)
        except Exception:
            self.held = None  # some of it may have arrived: search the store before sending again
            raise

    def _update(self, *, settle: bool, merge: bool) -> None:
        held = self._find_or_create()
        parent = survivor(held[self.series_id])
        for identity, kind in self.begun:
            one = survivor(held[identity])
            if one is None:
                self.notes.append(
                    f"{kind} {identity} was deleted in MLflow and is not mirrored; restore it there to mirror it"
                )
                continue
            row, progress = self._row(identity), self.journals[identity]
            run = row.point.run
            if kind == "run":
                status = status_of_run(row, progress, settle=settle)
                document = run.canonical()
            else:
                status = status_of_series(self.rows, self.journals, self.series_id, settle=settle)
                document = run.series_canonical()
            tags = self._tags(identity, parent) | self.experiment.send_json(one, f"{kind}.json", document)
            if one.attempt not in {0, progress.attempt}:
                one.marks_are_complete = False  # the attempt may repeat steps that another mirror has sent
            one.attempt = progress.attempt
            doubles = active(held[identity])[1:] if merge else []
            if doubles:
                # The other runs may have been ahead: query the store for what this one lacks.
                one.marks, one.marks_are_complete = {}, False
            fields = run.model_dump(mode="json", exclude=set() if kind == "run" else {"iterations"})
            send_journal(self.experiment, one, progress, status, dict(_flat(fields)), tags)
            if kind == "run" and (scores := evaluation_metrics(self.root, identity, run.iterations)):
                # No marks cover scores, since they may be replaced.
                digest = hashlib.sha256(repr(sorted(scores)).encode()).hexdigest()[:16]
                self.experiment.add(one, scores, "ssmscale.evaluated", digest)
            for other in doubles:
                self.experiment.merge(other, one)
                self.merged += 1

    def _find_or_create(self) -> dict[str, list[Held]]:
        held = self.know(self._search()) if self.held is None else self.held
        if any(identity not in held for identity, _ in self.begun):
            with file_lock(self.root.series(self.series_id) / "mlflow.lock"):
                held = self.know(self._search())
                for identity, kind in self.begun:
                    if identity not in held:
                        held[identity] = [
                            self._create(identity, kind, survivor(held.get(self.series_id, ())))
                        ]
        return held

    def _search(self) -> Iterator[Held]:
        return self.experiment.search(SERIES, self.series_id)

    def _create(self, identity: str, kind: str, parent: Held | None) -> Held:
        point, start = self._row(identity).point, self.journals[identity].started or {}
        name = f"{point.architecture}-{point.size}-s{point.run.seed}"
        if kind == "run":
            name = f"{name}-{point.run.iterations}"
        begun = milliseconds(start.get("t") or time.time())
        return self.experiment.create(identity, kind, name, begun, self._tags(identity, parent))

    def _tags(self, identity: str, parent: Held | None) -> dict[str, str]:
        row, start = self._row(identity), self.journals[identity].started or {}
        tags = {
            "ssmscale.architecture": row.point.architecture,
            "ssmscale.size": row.point.size,
            SERIES: self.series_id,
            "ssmscale.cluster": self.series_id,
            "ssmscale.dispatcher": start.get("dispatcher"),
            "ssmscale.job_id": start.get("job_id"),
            "ssmscale.host": start.get("host"),
            "ssmscale.commit": start.get("commit"),
            PARENT: parent.mlflow_id if parent is not None and identity != self.series_id else None,
        }
        return {key: str(value) for key, value in tags.items() if value is not None} | dict(self.tags_of(row))

    def _row(self, identity: str) -> RunStatus:
        """Return a Run's row; for the Series that of its first Run."""
        return next((row for row in self.rows if row.run_id == identity), self.rows[0])


def send_journal(
    experiment: Experiment,
    held: Held,
    progress: Progress,
    status: MlflowStatus | None,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> None:
    """Send a run what it lacks of its journal, then its status and end."""
    reason = {} if status is None or status.reason is None else {REASON: status.reason}
    values = measured(progress, is_run=held.kind == "run")
    experiment.send(held, values, params, {**tags, **reason})
    if status is not None:
        experiment.end(held, status.status, status.milliseconds)


def active(found: Sequence[Held]) -> list[Held]:
    """Return the runs that are not deleted, oldest first, in the same order on every host."""
    return sorted((one for one in found if not one.deleted), key=lambda one: (one.start, one.mlflow_id))


def survivor(found: Sequence[Held]) -> Held | None:
    """Return the oldest run of an identity; None if there is none or all were deleted."""
    return next(iter(active(found)), None)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested fields as MLflow parameters, with dots between levels."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    elif value is not None:
        yield key, str(value)
