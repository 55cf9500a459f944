"""One Series in MLflow: a run for the Series and one for each of its Runs.

Runs are created under a lock beside the Series, after another search of the store, so that mirrors on one disk create
each once. Mirrors on different disks can create a run twice. Then every host uses the oldest, and a thorough mirroring
deletes the others once the oldest has everything.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from filelock import FileLock

from harness.record.journal import Progress, ProgressReader
from harness.record.root import Root
from harness.record.status import RunStatus
from harness.study.run import Run
from harness.tracking.experiment import PARENT, REASON, SERIES, Artefacts, Experiment, Held
from harness.tracking.metrics import (
    Measured,
    MlflowStatus,
    evaluation_metrics,
    measured,
    milliseconds,
    result_of,
    status_of_run,
    status_of_series,
)

CLUSTER, EVALUATED = "ssmscale.cluster", "ssmscale.evaluated"


@dataclass(frozen=True)
class Members:
    """The rows and journals of one Series."""

    series_id: str
    rows: Sequence[RunStatus]
    trunk: Progress
    own: Mapping[str, Progress]

    @property
    def begun(self) -> list[tuple[str, str]]:
        """(identity, kind) of everything with a journal, the Series first; empty before any."""
        runs = [(row.run_id, "run") for row in self.rows if self.own[row.run_id].attempt]
        return [(self.series_id, "series"), *runs] if runs or self.trunk.attempt else []

    def progress(self, identity: str) -> Progress:
        """Return the journal of the Series or of one of its Runs."""
        return self.trunk if identity == self.series_id else self.own[identity]

    def row(self, identity: str) -> RunStatus:
        """Return a Run's row; for the Series that of its first Run."""
        return next((row for row in self.rows if row.run_id == identity), self.rows[0])


class SeriesMirror:
    """The state of one Series in MLflow, kept until the Series is over."""

    def __init__(
        self,
        experiment: Experiment,
        artefacts: Artefacts,
        root: Root,
        series_id: str,
        tags_of: Callable[[RunStatus], Mapping[str, str]] = lambda _: {},
    ) -> None:
        self.experiment, self.artefacts, self.root, self.tags_of = experiment, artefacts, root, tags_of
        self.series_id = series_id
        self.reader = ProgressReader()
        self.held: dict[str, list[Held]] | None = None
        """MLflow's runs by identity; None before a search."""
        self.notes: list[str] = []
        self.merged = 0

    def know(self, found: Iterable[Held]) -> dict[str, list[Held]]:
        """Replace `held` by the result of a search."""
        self.held = held = {}
        for one in found:
            held.setdefault(one.identity, []).append(one)
        return held

    def mlflow_ids(self) -> dict[str, str]:
        """Return MLflow's run by identity."""
        survivors = {identity: survivor(found) for identity, found in (self.held or {}).items()}
        return {identity: held.mlflow_id for identity, held in survivors.items() if held is not None}

    def read(self, rows: Sequence[RunStatus]) -> Members:
        """Read the journals of the Series and of its Runs."""
        trunk = self.reader.read(self.root.series(self.series_id))
        own = {row.run_id: self.reader.read(self.root.run(row.run_id)) for row in rows}
        return Members(self.series_id, rows, trunk, own)

    def update(self, members: Members, *, settle: bool, merge: bool) -> None:
        """Send MLflow everything it lacks; raises MLflow's exceptions."""
        try:
            self._update(members, settle=settle, merge=merge)
        except Exception:
            self.held = None  # some of it may have arrived: search the store before sending again
            raise

    def _update(self, members: Members, *, settle: bool, merge: bool) -> None:
        held = self._find_or_create(members)
        parent = survivor(held[self.series_id])
        for identity, kind in members.begun:
            one = survivor(held[identity])
            if one is None:
                self.notes.append(
                    f"{kind} {identity} was deleted in MLflow and is not mirrored; restore it there to mirror it"
                )
                continue
            row, progress = members.row(identity), members.progress(identity)
            if kind == "run":
                status = status_of_run(row, progress, settle=settle)
                document = row.point.run.canonical()
            else:
                status = status_of_series(members.rows, members.own, members.trunk, settle=settle)
                document = row.point.run.series_canonical()
            tags = self._tags(members, identity, parent)
            tags |= self.artefacts.keep_json(one, f"{kind}.json", document)
            if one.attempt not in {0, progress.attempt}:
                one.marks_are_complete = False  # the attempt may repeat steps that another mirror has sent
            one.attempt = progress.attempt
            doubles = active(held[identity])[1:] if merge else []
            if doubles:
                # The other runs may have been ahead: query the store for what this one lacks.
                one.marks, one.marks_are_complete = {}, False
            send_journal(self.experiment, one, progress, status, dict(_flat(row.point.run, kind)), tags)
            if kind == "run" and (
                scores := evaluation_metrics(self.root, identity, row.point.run.iterations)
            ):
                self.experiment.add(one, scores, EVALUATED, digest_of(scores))
            for other in doubles:
                self.experiment.merge(other, one)
                self.merged += 1

    def _find_or_create(self, members: Members) -> dict[str, list[Held]]:
        held = self.know(self._search()) if self.held is None else self.held
        if any(identity not in held for identity, _ in members.begun):
            with FileLock(self.root.series(self.series_id) / "mlflow.lock"):
                held = self.know(self._search())
                for identity, kind in members.begun:
                    if identity not in held:
                        parent = survivor(held.get(self.series_id, ()))
                        held[identity] = [self._create(members, identity, kind, parent)]
        return held

    def _search(self) -> Iterator[Held]:
        return self.experiment.search(SERIES, self.series_id)

    def _create(self, members: Members, identity: str, kind: str, parent: Held | None) -> Held:
        row, start = members.row(identity), members.progress(identity).started or {}
        name = f"{row.point.architecture}-{row.point.size}-s{row.point.run.seed}"
        if kind == "run":
            name = f"{name}-{row.point.run.iterations}"
        begun = milliseconds(start.get("t") or time.time())
        return self.experiment.create(identity, kind, name, begun, self._tags(members, identity, parent))

    def _tags(self, members: Members, identity: str, parent: Held | None) -> dict[str, str]:
        row, start = members.row(identity), members.progress(identity).started or {}
        tags = {
            "ssmscale.architecture": row.point.architecture,
            "ssmscale.size": row.point.size,
            SERIES: self.series_id,
            CLUSTER: self.series_id,
            "ssmscale.dispatcher": start.get("dispatcher"),
            "ssmscale.job_id": start.get("job_id"),
            "ssmscale.host": start.get("host"),
            "ssmscale.commit": start.get("commit"),
            PARENT: parent.mlflow_id if parent is not None and identity != self.series_id else None,
        }
        return {key: str(value) for key, value in tags.items() if value is not None} | dict(self.tags_of(row))


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
    result = result_of(progress) if held.kind == "run" else None
    experiment.send(held, measured(progress, result), params, {**tags, **reason})
    if status is not None:
        experiment.end(held, status.status, status.milliseconds)


def active(found: Sequence[Held]) -> list[Held]:
    """Return the runs that are not deleted, oldest first, in the same order on every host."""
    return sorted((one for one in found if not one.deleted), key=lambda one: (one.start, one.mlflow_id))


def survivor(found: Sequence[Held]) -> Held | None:
    """Return the oldest run of an identity; None if there is none or all were deleted."""
    return next(iter(active(found)), None)


def digest_of(scores: Sequence[Measured]) -> str:
    """Return the digest that tags a run which has these scores; no marks cover them, since they may be replaced."""
    return hashlib.sha256(repr(sorted(scores)).encode()).hexdigest()[:16]


def _flat(run: Run, kind: str) -> Iterator[tuple[str, str]]:
    """Yield the Run's fields as MLflow parameters, dots between levels; a Series has no `iterations`."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        elif value is not None:
            yield prefix, str(value)

    for key, value in walk("", run.model_dump(mode="json")):
        if kind == "run" or key != "iterations":
            yield key, value
