"""What of a study is mirrored and closed: a small file that spares asking MLflow about every finished run.

Reading ten thousand runs back out of MLflow takes longer than everything else a table of points needs. So the mirror
notes for each Series whose story is over what its journals looked like (files and sizes) and which MLflow runs hold it.
While that stands, there is nothing to send. The note holds for one store and one experiment made at one time; any other
makes it void. It is never needed and never the truth: `ssmscale sync` does not look at it, checks everything and writes
it anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.rundir import write_atomically


class Record:
    """ROOT/studies/NAME/mirrored.json."""

    def __init__(self, path: Path, store: str, experiment: str, made: int) -> None:
        self.path = path
        # An address may hold a password.
        self._key = [hashlib.sha256(store.encode()).hexdigest(), experiment, made]
        self._closed: dict[str, tuple[str, dict[str, str]]] = {}
        self._changed = False
        self._read()

    def holds(self, identity: str, state: str) -> bool:
        """Whether that Series (or the study's own run) was closed with its journals in that state."""
        return self._closed.get(identity, ("", {}))[0] == state

    def close(self, identity: str, state: str, mlflow_ids: Mapping[str, str]) -> None:
        """Note that everything of a Series is in MLflow, in which runs, by run id."""
        if self._closed.get(identity) != (state, dict(mlflow_ids)):
            self._closed[identity] = (state, dict(mlflow_ids))
            self._changed = True

    def forget(self) -> None:
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
            self._closed = {}  # no record, or none that can be read: everything is asked about


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
