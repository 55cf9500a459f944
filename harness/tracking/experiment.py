"""One study's experiment in an MLflow store, and all calls of MLflow.

No metric is sent twice. A tag marks what was sent, in the same call as the metrics; MLflow writes parameters, metrics
and tags in this order. The mark may lag behind after a run was found rather than created, after a failed call, and when
a newer attempt may repeat steps that another mirror has sent. Then the store is queried, and only missing metrics are
sent: a call that failed may have taken effect. For the same reason MLflow's own repetition of requests is off.

Several ROOTs may keep a study of the same name in one store, in one experiment. A tag names the ROOT of each run, tags
of the experiment name all its ROOTs, and a ROOT finds its own runs alone. A run without that tag was made by an older
version: it is a ROOT's own if that ROOT holds the Series or Run, and gets the tag when something is sent.

A file is sent again only when its SHA-256, a tag of the run, has changed. The server's store of files may fail alone (a
bucket without keys, a full disk); metrics do not wait for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.common.address import redact, without_passwords
from harness.common.format import counted
from harness.common.validation import first_line
from harness.record.root import Root
from harness.tracking.metrics import Marks, Measured, above, dump_marks, load_marks, marks_after
from harness.tracking.store import ARTEFACTS, connect, is_server
from harness.tracking.watch import Watch
from ssmttm.errors import InputError
from ssmttm.files import parse_json

if TYPE_CHECKING:
    from mlflow.entities import Param

ID, KIND, SERIES = "ssmscale.id", "ssmscale.kind", "ssmscale.series"
MIRRORED, REASON, MERGED = "ssmscale.mirrored", "ssmscale.reason", "ssmscale.merged_into"
PARENT = "mlflow.parentRunId"
ROOT = "ssmscale.root"
"""Tag of a run: its ROOT's identity. An experiment has a tag `ssmscale.root.IDENTITY` with the path of each ROOT."""
STUDY = "study"
"""Kind of the run that holds the study's files."""
MOST_METRICS = 800
"""Metrics of one call: MLflow takes 1000 items in all, parameters and tags included."""
SHA256 = "ssmscale.sha256."
STUDY_FILES = ("study.json", "plan.json", "report/report.html", "report/fit.json")
"""Files of ROOT/studies/NAME: the submitted study, its plan, and its newest report."""


@dataclass
class Held:
    """One run in the store."""

    identity: str
    kind: str
    mlflow_id: str
    status: str
    start: int
    """Milliseconds."""
    end: int | None
    tags: dict[str, str]
    has_params: bool
    deleted: bool
    marks: Marks = field(default_factory=dict)
    marks_are_complete: bool = False
    """True if the marks cover everything in the store."""
    attempt: int = 0
    """Newest attempt whose journal this process has sent; 0 before any."""


class Experiment:
    """A study's experiment; raises MLflow's exceptions, and InputError if the experiment was deleted."""

    def __init__(self, uri: str, name: str, root: Root, note: str = "", watch: Watch | None = None) -> None:
        self.uri, self.name, self.root, self.identity = uri, name, root, root.identity()
        self.client = connect(uri, watch)
        found = self.client.get_experiment_by_name(name) or self._create(note)
        if found.lifecycle_stage != "active":
            raise InputError(
                f"study {name}: its experiment was deleted in MLflow; restore experiment {found.experiment_id} "
                f"(`mlflow experiments restore -x {found.experiment_id}`) or rename the study"
            )
        self.id = str(found.experiment_id)
        place, own = str(root.path.absolute()), f"{ROOT}.{self.identity}"
        self.is_first_visit = own not in found.tags
        """True if this ROOT has not mirrored the study to this store before."""
        if found.tags.get(own) != place:
            self.client.set_experiment_tag(self.id, own, place)
        self.others = [key for key in found.tags if key.startswith(f"{ROOT}.") and key != own]
        """Tags of other ROOTs with a study of this name."""
        self.files_problem: str | None = None
        """The first refusal of a file; none is sent after it."""
        self.made = int(found.creation_time or 0)
        """Creation time (ms): with the id, it identifies the experiment even if the store was created anew."""

    def notes(self, *, is_thorough: bool) -> list[str]:
        """Return sentences for the user; other ROOTs are named at the first visit and in a thorough mirroring."""
        found = [self.files_problem] if self.files_problem is not None else []
        if self.others and (is_thorough or self.is_first_visit):
            found.append(
                f"{counted(len(self.others), 'other ROOT')} with a study named {self.name} in MLflow at "
                f"{redact(self.uri)}; runs of other ROOTs are left alone"
            )
        return found

    def _create(self, note: str) -> Any:
        from mlflow.exceptions import MlflowException

        # A server keeps artefacts itself, so that readers on other machines need no path of this one.
        where = None if is_server(self.uri) else (self.root.path / ARTEFACTS).absolute().as_uri()
        try:
            tags = {"mlflow.note.content": note}
            self.client.create_experiment(self.name, artifact_location=where, tags=tags)
        except MlflowException:
            if self.client.get_experiment_by_name(self.name) is None:
                raise
        return self.client.get_experiment_by_name(self.name)  # another process may have created it

    def search(self, tag: str = "", value: str = "") -> Iterator[Held]:
        """Yield the ROOT's runs in the experiment, deleted ones too: all, or those with that value of a tag."""
        for held in self._search(tag, value):
            if held.tags.get(ROOT) == self.identity or (ROOT not in held.tags and self._adopts(held)):
                yield held

    def _search(self, tag: str, value: str) -> Iterator[Held]:
        from mlflow.entities import ViewType

        wanted = f"tags.`{tag}` = '{value}'" if tag else ""
        token = None
        while True:
            page = self.client.search_runs(
                [self.id], wanted, run_view_type=ViewType.ALL, max_results=1000, page_token=token
            )
            yield from (_held(run) for run in page if ID in run.data.tags)
            token = page.token
            if not token:
                return

    def _adopts(self, held: Held) -> bool:
        """True if a run that an older version made is this ROOT's: nothing says that it is another one's."""
        if held.kind != STUDY:
            return self._holds(held) or not self.others
        series = [one for one in self._search(KIND, "series") if ROOT not in one.tags]
        return any(map(self._holds, series)) if series else not self.others

    def _holds(self, held: Held) -> bool:
        place = self.root.series if held.kind == "series" else self.root.run
        return place(held.identity).is_dir()

    def last_sign(self, held: Held) -> int:
        """Return the time (ms) of a run's newest metric, or of its start."""
        keys = self.client.get_run(held.mlflow_id).data.metrics
        sent = (metric for key in keys for metric in self.client.get_metric_history(held.mlflow_id, key))
        return max((int(metric.timestamp) for metric in sent), default=held.start)

    def create(self, identity: str, kind: str, name: str, start: int, tags: Mapping[str, str]) -> Held:
        """Create a run with all its tags."""
        tags = {ID: identity, KIND: kind, ROOT: self.identity, **tags}
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
        """Send a run the metrics and tags it lacks; no call if it lacks none.

        Parameters are sent to a run that has none, and never again: MLflow refuses changed ones.
        """
        from mlflow.entities import Param

        pending, disagree = above(found, held.marks)
        if disagree or not held.marks_are_complete:
            pending = self._missing(held, pending)
        marks = marks_after(found, held.marks)
        wanted_tags = {ROOT: self.identity, **(tags or {})}
        fresh = {key: value for key, value in wanted_tags.items() if held.tags.get(key) != value}
        if marks != held.marks:
            fresh[MIRRORED] = dump_marks(marks)
        wanted = [] if held.has_params else [Param(key, value) for key, value in (params or {}).items()]
        if pending or fresh or wanted:
            held.marks_are_complete = False
            self._log(held, pending, fresh, wanted)
            held.has_params = held.has_params or bool(wanted)
        held.marks_are_complete, held.marks = True, marks

    def add(self, held: Held, found: Sequence[Measured], tag: str, value: str) -> None:
        """Send metrics without marks, once for each value of a tag."""
        if held.tags.get(tag) != value:
            self._log(held, self._missing(held, found), {tag: value})

    def end(self, held: Held, status: str, when: int | None) -> None:
        """Set a run's status and end (ms); no call if they are right."""
        if status == "RUNNING":
            if held.status != status:
                self.client.update_run(held.mlflow_id, status=status)
        else:
            end = max(when or 0, held.start)  # no run ends before its start: a clock may have been set back
            if (held.status, held.end) != (status, end):
                self.client.set_terminated(held.mlflow_id, status=status, end_time=end)
            held.end = end
        if status in {"RUNNING", "FINISHED"} and REASON in held.tags:
            self.client.delete_tag(held.mlflow_id, REASON)  # of an earlier failure
            del held.tags[REASON]
        held.status = status

    def merge(self, held: Held, survivor: Held) -> None:
        """Delete a copy of a run and tag it with the survivor; MLflow's page can still show it."""
        self.client.set_tag(held.mlflow_id, MERGED, survivor.mlflow_id)
        self.client.delete_run(held.mlflow_id)
        held.tags[MERGED], held.deleted = survivor.mlflow_id, True

    def _missing(self, held: Held, found: Sequence[Measured]) -> list[Measured]:
        """Query the store; return the metrics it lacks."""
        there = {
            (key, int(metric.step))
            for key in {one.key for one in found}
            for metric in self.client.get_metric_history(held.mlflow_id, key)
        }
        return [one for one in found if (one.key, one.step) not in there]

    def _log(
        self, held: Held, found: Sequence[Measured], tags: Mapping[str, str], params: Sequence[Param] = ()
    ) -> None:
        """Write metrics in batches, the last with tags and parameters."""
        from mlflow.entities import Metric, RunTag

        metrics = [Metric(one.key, one.value, one.milliseconds, one.step) for one in found]
        while len(metrics) > MOST_METRICS:
            self.client.log_batch(held.mlflow_id, metrics=metrics[:MOST_METRICS])
            metrics = metrics[MOST_METRICS:]
        fresh = [RunTag(key, value) for key, value in tags.items()]
        self.client.log_batch(held.mlflow_id, metrics=metrics, params=params, tags=fresh)
        held.tags.update(tags)

    def send_json(self, held: Held, name: str, document: Mapping[str, object]) -> dict[str, str]:
        """Send a small document to a run; return the tag to set, none if it is there or was refused."""
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        send = partial(self.client.log_text, held.mlflow_id, text, name)
        return self._send_file(held, name, text.encode(), send)

    def send_files(self, held: Held, folder: Path) -> dict[str, str]:
        """Send the study's files that have changed; return the tags to set."""
        tags: dict[str, str] = {}
        for name in STUDY_FILES:
            path = folder / name
            if path.is_file():
                content, send = (
                    path.read_bytes(),
                    partial(self.client.log_artifact, held.mlflow_id, str(path)),
                )
                if path.suffix == ".json" and (kept := without_passwords(parse_json(content))) != parse_json(
                    content
                ):
                    content = json.dumps(kept, indent=1).encode()
                    send = partial(self.client.log_text, held.mlflow_id, content.decode(), path.name)
                tags |= self._send_file(held, path.name, content, send)
        return tags

    def _send_file(self, held: Held, name: str, content: bytes, send: Callable[[], object]) -> dict[str, str]:
        tag, digest = SHA256 + name, hashlib.sha256(content).hexdigest()
        if self.files_problem is not None or held.tags.get(tag) == digest:
            return {}
        try:
            send()
        except Exception as error:  # each kind of file store has its own exceptions
            self.files_problem = f"MLflow stores no files: {first_line(error)}"
            return {}
        return {tag: digest}


def study_facts(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of each of the study's files, to notice a change."""
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
