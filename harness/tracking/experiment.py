"""One study's experiment in an MLflow store: every call made of MLflow, and what is known of its answers.

A metric that the store has is never sent again. Between a run's creation here and its end that needs no question: what
was sent is marked, in the same call and after the metrics (MLflow writes parameters, metrics and tags in this order).
After a run was found rather than made, after a call that failed, and where a newer attempt may repeat steps that
another mirror has sent meanwhile, the mark may lag behind: then the store is asked for what it has of the pending keys,
and only what is missing goes there. A server that answers an error after it has written is therefore asked, and not
sent the same twice. For the same reason MLflow's own repetition of requests is off.

Files are sent to a run once, and again only when their content has changed: a tag of the run holds the SHA-256 of each.
The server's store of files may fail alone (a bucket without its keys, a full disk); metrics do not wait for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.common.validation import first_line
from harness.tracking.metrics import Marks, Measured, above, dump_marks, load_marks, marks_after
from harness.tracking.store import connect
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from mlflow.entities import Param

ID, KIND, SERIES = "ssmscale.id", "ssmscale.kind", "ssmscale.series"
MIRRORED, REASON, MERGED = "ssmscale.mirrored", "ssmscale.reason", "ssmscale.merged_into"
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"
MOST_METRICS = 800
"""Metrics of one call: MLflow takes 1000 things in all, and parameters and tags go with them."""
PAGE = 1000
"""Runs of one answer of the store."""
SHA256 = "ssmscale.sha256."
STUDY_FILES = ("study.json", "plan.json", "report/report.html", "report/fit.json")
"""Files of ROOT/studies/NAME: the study as submitted, as planned then, and as last reported."""


@dataclass
class Held:
    """One run as the store has it."""

    identity: str
    kind: str
    mlflow_id: str
    status: str
    start: int
    """Milliseconds; a run never ends before."""
    end: int | None
    tags: dict[str, str]
    has_params: bool
    deleted: bool
    marks: Marks = field(default_factory=dict)
    marks_are_complete: bool = False
    """True if the marks are known to cover everything the store has."""
    attempt: int = 0
    """Newest attempt whose journal was sent from here; 0 before any."""


class Experiment:
    """A study's experiment; raises whatever MLflow raises, and InputError where the experiment was deleted."""

    def __init__(self, uri: str, name: str, artefacts: Path, note: str = "") -> None:
        self.uri, self.name = uri, name
        self.client = connect(uri)
        found = self.client.get_experiment_by_name(name) or self._create(artefacts, note)
        if found.lifecycle_stage != "active":
            raise InputError(
                f"study {name}: its experiment was deleted in MLflow; restore experiment {found.experiment_id} there "
                f"(`mlflow experiments restore -x {found.experiment_id}`) or give the study another name"
            )
        self.id = str(found.experiment_id)
        self.made = int(found.creation_time or 0)
        """When it was created (ms): with the id, what tells it from one in a store made anew."""

    @property
    def is_server(self) -> bool:
        """True if the store is a server, and not a database that is opened from here."""
        return self.uri.startswith(("http://", "https://"))

    def _create(self, artefacts: Path, note: str) -> Any:
        from mlflow.exceptions import MlflowException

        # A server keeps artefacts itself, so that whoever reads them needs no path of this machine.
        where = None if self.is_server else artefacts.absolute().as_uri()
        try:
            self.client.create_experiment(self.name, artifact_location=where, tags={NOTE: note})
        except MlflowException:
            if self.client.get_experiment_by_name(self.name) is None:
                raise
        return self.client.get_experiment_by_name(self.name)  # another process may have made it

    def search(self, tag: str = "", value: str = "") -> Iterator[Held]:
        """The experiment's runs that are ours, deleted ones too: all, or those with that value of a tag."""
        from mlflow.entities import ViewType

        wanted = f"tags.`{tag}` = '{value}'" if tag else ""
        token = None
        while True:
            page = self.client.search_runs(
                [self.id], wanted, run_view_type=ViewType.ALL, max_results=PAGE, page_token=token
            )
            yield from (_held(run) for run in page if ID in run.data.tags)
            token = page.token
            if not token:
                return

    def steps_of(self, held: Held, keys: Collection[str]) -> set[tuple[str, int]]:
        """Every (metric, step) of those metrics that the store has."""
        return {
            (key, int(metric.step))
            for key in keys
            for metric in self.client.get_metric_history(held.mlflow_id, key)
        }

    def create(self, identity: str, kind: str, name: str, start: int, tags: Mapping[str, str]) -> Held:
        """Create a run with all its tags."""
        tags = {ID: identity, KIND: kind, **tags}
        made = self.client.create_run(self.id, start_time=start, tags=tags, run_name=name)
        held = _held(made)
        held.marks_are_complete = True
        return held

    def send(
        self,
        held: Held,
        found: Sequence[Measured],
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Bring a run's metrics and tags to what was found; no call where nothing is new.

        Parameters are sent to a run that has none, and never again: MLflow refuses a changed one.
        """
        from mlflow.entities import Param

        pending, disagree = above(found, held.marks)
        if disagree or not held.marks_are_complete:
            pending = self._missing(held, pending)
        marks = marks_after(found, held.marks)
        fresh = {key: value for key, value in (tags or {}).items() if held.tags.get(key) != value}
        if marks != held.marks:
            fresh[MIRRORED] = dump_marks(marks)
        wanted = [] if held.has_params else [Param(key, value) for key, value in (params or {}).items()]
        if pending or fresh or wanted:
            held.marks_are_complete = False
            self._log(held, pending, fresh, wanted)
            held.has_params = held.has_params or bool(wanted)
        held.marks_are_complete, held.marks = True, marks

    def add(self, held: Held, found: Sequence[Measured], tag: str, value: str) -> None:
        """Send metrics that no mark covers, once for each value of a tag."""
        if held.tags.get(tag) != value:
            self._log(held, self._missing(held, found), {tag: value})

    def end(self, held: Held, status: str, when: int | None) -> None:
        """Bring a run's status and end (ms) to what they should be; no call where they are."""
        if status == "RUNNING":
            if held.status != status:
                self.client.update_run(held.mlflow_id, status=status)
        else:
            end = max(when or 0, held.start)  # a clock may have been set back
            if (held.status, held.end) != (status, end):
                self.client.set_terminated(held.mlflow_id, status=status, end_time=end)
            held.end = end
        if status in {"RUNNING", "FINISHED"} and REASON in held.tags:
            self.client.delete_tag(held.mlflow_id, REASON)  # it ended badly once, and went on
            del held.tags[REASON]
        held.status = status

    def merge(self, held: Held, survivor: Held) -> None:
        """Delete a run that is there twice, saying into which one it went; MLflow's page can still show it."""
        self.client.set_tag(held.mlflow_id, MERGED, survivor.mlflow_id)
        self.client.delete_run(held.mlflow_id)
        held.tags[MERGED], held.deleted = survivor.mlflow_id, True

    def _missing(self, held: Held, found: Sequence[Measured]) -> list[Measured]:
        """Those of the metrics that the store does not have yet, as it says itself."""
        there = self.steps_of(held, {one.key for one in found})
        return [one for one in found if (one.key, one.step) not in there]

    def _log(
        self, held: Held, found: Sequence[Measured], tags: Mapping[str, str], params: Sequence[Param] = ()
    ) -> None:
        """Write metrics, and with the last of them tags and parameters."""
        from mlflow.entities import Metric, RunTag

        metrics = [Metric(one.key, one.value, one.milliseconds, one.step) for one in found]
        while len(metrics) > MOST_METRICS:
            self.client.log_batch(held.mlflow_id, metrics=metrics[:MOST_METRICS])
            metrics = metrics[MOST_METRICS:]
        fresh = [RunTag(key, value) for key, value in tags.items()]
        self.client.log_batch(held.mlflow_id, metrics=metrics, params=params, tags=fresh)
        held.tags.update(tags)


class Artefacts:
    """Sends files to runs of one experiment; after one refusal none is tried again in this object's life."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.problem: str | None = None
        """Reason why files are not taken, once they are not."""

    def keep_json(self, held: Held, name: str, document: Mapping[str, object]) -> dict[str, str]:
        """Keep a small document with a run; returns the tag that says so, nothing where it is there or was refused."""
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        send = partial(self.experiment.client.log_text, held.mlflow_id, text, name)
        return self._keep(held, name, text.encode(), send)

    def keep_files(self, held: Held, folder: Path) -> dict[str, str]:
        """Keep the study's files that have changed; returns the tags that say so."""
        tags: dict[str, str] = {}
        for name in STUDY_FILES:
            path = folder / name
            if path.is_file():
                send = partial(self.experiment.client.log_artifact, held.mlflow_id, str(path))
                tags |= self._keep(held, path.name, path.read_bytes(), send)
        return tags

    def _keep(self, held: Held, name: str, content: bytes, send: Callable[[], object]) -> dict[str, str]:
        tag, digest = SHA256 + name, hashlib.sha256(content).hexdigest()
        if self.problem is not None or held.tags.get(tag) == digest:
            return {}
        try:
            send()
        except Exception as error:  # each kind of store for files has errors of its own
            self.problem = f"MLflow does not keep files: {first_line(error)}"
            return {}
        return {tag: digest}


def study_facts(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each of the study's files that are there: what changes when one of them does."""
    held = {name: (folder / name).stat() for name in STUDY_FILES if (folder / name).is_file()}
    return [(name, facts.st_size, facts.st_mtime_ns) for name, facts in held.items()]


def _held(run: Any) -> Held:
    tags = dict(run.data.tags)
    return Held(
        identity=tags[ID],
        kind=tags.get(KIND, ""),
        mlflow_id=run.info.run_id,
        status=run.info.status,
        start=int(run.info.start_time),
        end=run.info.end_time,
        tags=tags,
        has_params=bool(run.data.params),
        deleted=run.info.lifecycle_stage != "active",
        marks=load_marks(tags.get(MIRRORED)),
    )
