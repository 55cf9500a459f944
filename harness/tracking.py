"""MLflow as the shared view: journals are mirrored into it, finished points are read out of it.

The journals are the truth and training never waits for a tracker. An experiment is a study, a parent run a Series
with the trunk's metrics, a child run a Run with its decay and its result. Every metric carries the journal's own
timestamp and nothing at or below the step already mirrored is sent again, so mirroring can be repeated at will.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from filelock import FileLock

from harness.journal import Progress, read_progress
from harness.run import Run
from harness.rundir import Root
from harness.status import RunState, RunStatus
from harness.store import connect
from harness.study import Study
from harness.training.result import Result

log = logging.getLogger("ssmscale.tracking")

ID, KIND, MIRRORED, REASON = "ssmscale.id", "ssmscale.kind", "ssmscale.mirrored_step", "ssmscale.reason"
EVALUATED = "ssmscale.mirrored_evaluation"
MOST_METRICS = 1000
"""Metrics MLflow takes in one call."""
VALID_LOSS = "valid_loss"
STEP_METRICS = ("loss", "lr", "tokens", "tokens_per_second", "grad_norm", "mfu")


@dataclass(frozen=True)
class Point:
    """One row of the Points table: a finished Run."""

    run_id: str
    cluster: str
    """The Series: rows of one cluster are not independent."""
    architecture: str
    size: str
    n_params: int
    n_params_non_embedding: int
    iterations: int
    tokens: int
    flops: float
    loss: float
    seed: int
    annealed: bool


def default_uri(root: Root) -> str:
    """The SQLite store of a ROOT, used where nothing else is named."""
    return f"sqlite:///{(root.path / 'mlflow.db').absolute()}"


def tracking_uri(study: Study, root: Root) -> str:
    """Where a study is tracked: its own word, else MLFLOW_TRACKING_URI, else ROOT's SQLite store."""
    return study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(root)


class Tracker:
    """One study's experiment in an MLflow store; its methods raise whatever MLflow raises."""

    def __init__(self, uri: str, study_name: str, root: Root) -> None:
        self.uri, self.study_name, self.root = uri, study_name, root
        self._client = connect(uri)
        self.experiment_id = self._experiment()
        self._known: dict[str, _Mirrored] | None = None

    def mirror(self, rows: Sequence[RunStatus], *, settle: bool = False) -> None:
        """Send what the journals have and MLflow has not; `settle` closes the runs of what nobody trains."""
        known = self._runs()
        by_series: dict[str, list[RunStatus]] = {}
        for row in rows:
            by_series.setdefault(row.series_id, []).append(row)
        for series_id, members in by_series.items():
            trunk = read_progress(self.root.series(series_id))
            own = {row.run_id: read_progress(self.root.run(row.run_id)) for row in members}
            if trunk.attempt == 0 and not any(progress.attempt for progress in own.values()):
                continue
            parent = known.get(series_id) or self._create(series_id, "series", members[0], trunk, None)
            self._send(parent, trunk)
            for row in members:
                if own[row.run_id].attempt:
                    child = known.get(row.run_id) or self._create(
                        row.run_id, "run", row, own[row.run_id], parent.mlflow_id
                    )
                    self._send(child, own[row.run_id])
                    self._close_run(child, row, own[row.run_id], settle=settle)
            self._close_series(parent, members, settle=settle)

    def points(self, run_ids: Sequence[str]) -> list[Point]:
        """The finished Runs among `run_ids`, in that order, as MLflow has them."""
        held = {
            run.data.tags.get(ID): run for run in self._search(KIND, "run") if run.info.status == "FINISHED"
        }
        return [_point(held[run_id]) for run_id in run_ids if run_id in held]

    def links(self) -> dict[str, str]:
        """Pages of the runs, by run id, where the store is a server."""
        if not self.uri.startswith(("http://", "https://")):
            return {}
        base = f"{self.uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs"
        return {run.data.tags[ID]: f"{base}/{run.info.run_id}" for run in self._search(KIND, "run")}

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.study_name)
        if found is not None:
            return str(found.experiment_id)
        # A server keeps artefacts itself, so that whoever reads them needs no path of this machine.
        here = (self.root.path / "mlflow-artifacts").absolute().as_uri()
        served = self.uri.startswith(("http://", "https://"))
        return str(
            self._client.create_experiment(self.study_name, artifact_location=None if served else here)
        )

    def _runs(self) -> dict[str, _Mirrored]:
        if self._known is None:
            self._known = {run.data.tags[ID]: _mirrored(run) for run in self._search() if ID in run.data.tags}
        return self._known

    def _search(self, tag: str = "", value: str = "") -> Iterator[Any]:
        """The experiment's runs, all or those with that value of a tag."""
        wanted = f"tags.`{tag}` = '{value}'" if tag else ""
        token = None
        while True:
            page = self._client.search_runs([self.experiment_id], wanted, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _create(
        self, identity: str, kind: str, row: RunStatus, progress: Progress, parent: str | None
    ) -> _Mirrored:
        """Create the run of a Series or Run, unless another process has done so in the meantime."""
        with FileLock(self.root.path / "mlflow-runs.lock"):
            created = next(self._search(ID, identity), None)
            if created is None:
                created = self._create_run(identity, kind, row, progress, parent)
            self._runs()[identity] = _mirrored(created)
        return self._runs()[identity]

    def _create_run(
        self, identity: str, kind: str, row: RunStatus, progress: Progress, parent: str | None
    ) -> Any:
        from mlflow.entities import Param

        run, start = row.point.run, progress.started or {}
        name = f"{row.point.architecture}-{row.point.size}-s{run.seed}"
        tags = {
            ID: identity,
            KIND: kind,
            "ssmscale.architecture": row.point.architecture,
            "ssmscale.size": row.point.size,
            "ssmscale.series": row.series_id,
            "ssmscale.dispatcher": start.get("dispatcher"),
            "ssmscale.job_id": start.get("job_id"),
            "ssmscale.host": start.get("host"),
            "ssmscale.commit": start.get("commit"),
            "mlflow.parentRunId": parent,
        }
        created = self._client.create_run(
            self.experiment_id,
            start_time=_milliseconds(start.get("t", time.time())),
            tags={key: str(value) for key, value in tags.items() if value is not None},
            run_name=name if kind == "series" else f"{name}-{run.iterations}",
        )
        params = [Param(key, str(value)) for key, value in _flat(run, kind)]
        self._client.log_batch(created.info.run_id, params=params)
        return created

    def _send(self, mirrored: _Mirrored, progress: Progress) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(key, float(event[name]), _milliseconds(event["t"]), step)
            for step, event, name, key in _measurements(progress)
            if step > (mirrored.evaluated if key == VALID_LOSS else mirrored.step)
        ]
        if not metrics:
            return
        for first in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(mirrored.mlflow_id, metrics=metrics[first : first + MOST_METRICS])
        # A step is journalled before the evaluation made after it, so each has a mark of its own.
        for metric in metrics:
            if metric.key == VALID_LOSS:
                mirrored.evaluated = max(mirrored.evaluated, metric.step)
            else:
                mirrored.step = max(mirrored.step, metric.step)
        marks = [RunTag(MIRRORED, str(mirrored.step)), RunTag(EVALUATED, str(mirrored.evaluated))]
        self._client.log_batch(mirrored.mlflow_id, tags=marks)

    def _close_run(self, mirrored: _Mirrored, row: RunStatus, own: Progress, *, settle: bool) -> None:
        from mlflow.entities import Metric, RunTag

        if row.state is RunState.DONE and own.result is not None:
            if mirrored.status == "FINISHED":
                return
            result = Result.model_validate({name: own.result[name] for name in Result.model_fields})
            when = _milliseconds(own.result["t"])
            values = result.model_dump(exclude={"loss_codebooks"})
            metrics = [
                Metric(f"final.{key}", float(value), when, result.step) for key, value in values.items()
            ]
            metrics += [
                Metric(f"final.loss_codebook_{k}", value, when, result.step)
                for k, value in enumerate(result.loss_codebooks)
            ]
            point = Point(
                run_id=row.run_id,
                cluster=row.series_id,
                architecture=row.point.architecture,
                size=row.point.size,
                iterations=row.point.run.iterations,
                seed=row.point.run.seed,
                **{key: values[key] for key in _FROM_RESULT},
            )
            # Tags keep whole numbers whole and a float to its last digit.
            tags = [RunTag(f"point.{key}", json.dumps(value)) for key, value in asdict(point).items()]
            self._client.log_batch(mirrored.mlflow_id, metrics=metrics, tags=tags)
            self._client.log_dict(mirrored.mlflow_id, row.point.run.canonical(), "run.json")
            self._end(mirrored, "FINISHED", when)
        elif row.state is RunState.FAILED:
            if mirrored.status != "FAILED":
                self._client.set_tag(mirrored.mlflow_id, REASON, str(row.reason))
                self._end(mirrored, "FAILED", _milliseconds((own.result or {}).get("t", time.time())))
        else:
            self._follow(mirrored, row.state, settle=settle)

    def _close_series(self, mirrored: _Mirrored, members: Sequence[RunStatus], *, settle: bool) -> None:
        states = {row.state for row in members}
        if states <= {RunState.DONE, RunState.CANCELLED} and RunState.DONE in states:
            if mirrored.status != "FINISHED":
                self._end(mirrored, "FINISHED", _milliseconds(time.time()))
        elif states <= {RunState.DONE, RunState.CANCELLED, RunState.FAILED} and RunState.FAILED in states:
            if mirrored.status != "FAILED":
                self._end(mirrored, "FAILED", _milliseconds(time.time()))
        else:
            waiting = states & {RunState.RUNNING, RunState.QUEUED}
            self._follow(mirrored, RunState.RUNNING if waiting else RunState.INTERRUPTED, settle=settle)

    def _follow(self, mirrored: _Mirrored, state: RunState, *, settle: bool) -> None:
        """A run that is not over: RUNNING while somebody trains it, KILLED once it is known that nobody does."""
        if state in {RunState.RUNNING, RunState.QUEUED}:
            if mirrored.status != "RUNNING":
                self._client.update_run(mirrored.mlflow_id, status="RUNNING")
                mirrored.status = "RUNNING"
        elif settle and mirrored.status != "KILLED":
            self._client.set_tag(mirrored.mlflow_id, REASON, f"{state}: no process trains it")
            self._end(mirrored, "KILLED", _milliseconds(time.time()))

    def _end(self, mirrored: _Mirrored, status: str, when: int) -> None:
        if status == "FINISHED" and REASON in self._client.get_run(mirrored.mlflow_id).data.tags:
            self._client.delete_tag(mirrored.mlflow_id, REASON)  # it ended badly once, and went on
        self._client.set_terminated(mirrored.mlflow_id, status=status, end_time=when)
        mirrored.status = status


_FROM_RESULT = ("n_params", "n_params_non_embedding", "tokens", "flops", "loss", "annealed")


@dataclass
class _Mirrored:
    """What MLflow has of one run."""

    mlflow_id: str
    step: int
    """Newest training step sent."""
    evaluated: int
    """Newest step whose evaluation was sent."""
    status: str


def _mirrored(run: Any) -> _Mirrored:
    tags = run.data.tags
    return _Mirrored(
        run.info.run_id, int(tags.get(MIRRORED, "0")), int(tags.get(EVALUATED, "0")), run.info.status
    )


class MirrorThread:
    """Mirrors while training goes on: the trainer's processes know nothing of it, its failures cost one warning."""

    def __init__(self, uri: str, study_name: str, root: Root, every_seconds: float = 3.0) -> None:
        self._arguments = (uri, study_name, root)
        self._every = every_seconds
        self._rows: Sequence[RunStatus] = ()
        self._wake = threading.Event()
        self._over = False
        self.problem: str | None = None
        self.tracker: Tracker | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)

    def start(self) -> None:
        """Begin mirroring; returns at once."""
        self._thread.start()

    def show(self, rows: Sequence[RunStatus]) -> None:
        """Say where the study stands now; the next round mirrors it."""
        self._rows = rows

    def finish(self, rows: Sequence[RunStatus]) -> None:
        """Mirror the end of the study and settle what nobody trains; returns when that is done or has failed."""
        self._rows, self._over = rows, True
        self._wake.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            over = self._over
            self._mirror(settle=over)
            if over:
                return
            self._wake.wait(self._every)

    def _mirror(self, *, settle: bool) -> None:
        try:
            if self.tracker is None:
                self.tracker = Tracker(*self._arguments)
            self.tracker.mirror(self._rows, settle=settle)
            self.problem = None
        except Exception as error:  # whatever a tracker does, training goes on
            if self.problem is None:
                log.warning("MLflow at %s: %s; the journals keep everything", self._arguments[0], error)
            self.problem = str(error)


def _measurements(progress: Progress) -> Iterator[tuple[int, Mapping[str, Any], str, str]]:
    """(step, event, field, metric name) of everything a journal measured, by step."""
    for step in sorted({*progress.steps, *progress.evals}):
        event = progress.steps.get(step, {})
        for name in STEP_METRICS:
            if name in event:
                yield step, event, name, "train_loss" if name == "loss" else name
        if step in progress.evals:
            yield step, progress.evals[step], "loss", VALID_LOSS


def _point(run: Any) -> Point:
    return Point(**{field.name: json.loads(run.data.tags[f"point.{field.name}"]) for field in fields(Point)})


def _flat(run: Run, kind: str) -> Iterator[tuple[str, object]]:
    """The Run's fields as MLflow parameters, dots between levels; a Series has no iterations of its own."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, object]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        elif value is not None:
            yield prefix, value

    for key, value in walk("", run.model_dump(mode="json")):
        if kind == "run" or key != "iterations":
            yield key, value


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
