"""Files kept with MLflow runs: each once, and again only when its content has changed.

A tag of the run holds the SHA-256 of each file it was given, so a replay sends nothing. Where files are kept is the
server's affair and may fail alone (a bucket without its keys, a full disk); metrics do not wait for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.brief import first_line
from harness.experiment import Experiment, Held

SHA256 = "ssmscale.sha256."
STUDY_FILES = ("study.json", "plan.json", "report/report.html", "report/fit.json")
"""What ROOT/studies/NAME holds of a study: as submitted, as planned then, and as last reported."""


class Artefacts:
    """Sends files to runs of one experiment; after one refusal none is tried again in this object's life."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.problem: str | None = None
        """Why files are not taken, once they are not."""

    def keep_json(self, held: Held, name: str, document: Mapping[str, object]) -> dict[str, str]:
        """Keep a small document with a run; returns the tag that says so, nothing where it is there or was refused."""
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        tag = SHA256 + name
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self.problem is not None or held.tags.get(tag) == digest:
            return {}
        return self._try(lambda: self.experiment.client.log_text(held.mlflow_id, text, name), {tag: digest})

    def keep_files(self, held: Held, folder: Path) -> dict[str, str]:
        """Keep the study's files that have changed; returns the tags that say so."""
        tags: dict[str, str] = {}
        for name in STUDY_FILES:
            path = folder / name
            if self.problem is not None or not path.is_file():
                continue
            tag = SHA256 + path.name
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if held.tags.get(tag) != digest:
                tags |= self._try(
                    lambda path=path: self.experiment.client.log_artifact(held.mlflow_id, str(path)),
                    {tag: digest},
                )
        return tags

    def _try(self, send: Any, tags: dict[str, str]) -> dict[str, str]:
        try:
            send()
        except Exception as error:  # each kind of store for files has errors of its own
            self.problem = f"MLflow does not keep files: {first_line(error)}"
            return {}
        return tags


def study_facts(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each of the study's files that are there: what changes when one of them does."""
    facts = []
    for name in STUDY_FILES:
        path = folder / name
        if path.is_file():
            held = path.stat()
            facts.append((name, held.st_size, held.st_mtime_ns))
    return facts
