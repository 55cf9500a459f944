"""Parts: tasks that do a part of a larger work, such as building a corpus or evaluating Runs.

To a backend a part is a task as any other: one rank, a folder with a journal, and an order that a worker understands.
Nothing joins a part and no micro-batch can be made smaller for it. Its journal alone tells what became of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, JsonValue

from harness.common.process import interpreter
from harness.dispatch.base import Task
from harness.record.control import Control
from harness.record.journal import Event, Journal, read_progress
from harness.record.kinds import Kind
from harness.record.root import Launch
from harness.record.series import JoinRequest, unfinished, untrained
from ssmttm.files import canonical_json

PARTS = "parts"
"""Name of the folder that holds the folders of parts, by which their journals are known."""


class Part(Task):
    """A part of a larger work."""

    model_config = ConfigDict(extra="ignore")

    kind: Literal["part"] = "part"
    does: str
    """Kind of its work, a key of harness.train.part's WORK."""
    request: str
    """The work as JSON, in the words of its kind."""
    on_gpu: bool = False
    drives_ray: bool = False

    @classmethod
    def of(cls, folder: Path, does: str, request: Mapping[str, JsonValue], **more: Any) -> Self:
        """Return the part of a folder, whose parent must be named `parts`; `more` are fields of Task."""
        assert folder.parent.name == PARTS
        words = canonical_json(dict(request))
        return cls(series_id=folder.name, run_dirs=(folder.absolute(),), does=does, request=words, **more)

    @property
    def folder(self) -> Path:
        """Its folder: journal, lock, heartbeat, log."""
        return self.run_dirs[0]

    @property
    def paths(self) -> list[Path]:
        """Paths that it reads and writes: the folder of its work, and those that stand in its request."""
        named = [Path(text) for text in _texts(json.loads(self.request)) if text.startswith("/")]
        # A path that the part will make is shown with the folder that holds it.
        # A text of the request may be no path: os.path.exists takes any.
        there = [next(folder for folder in (path, *path.parents) if os.path.exists(folder)) for path in named]  # noqa: PTH110
        return [self.folder.parent.parent, *(path for path in there if path != Path("/"))]

    @property
    def title(self) -> str:
        """Name in messages and logs."""
        return f"part {self.series_id}"

    @property
    def order(self) -> JsonValue:
        """Order that a worker understands."""
        return {"does": self.does, "folder": str(self.folder), "request": json.loads(self.request)}

    @property
    def command(self) -> list[str]:
        """Command line of its process."""
        return interpreter("-u", "-m", "harness.train.part", json.dumps(self.order))

    def control_of(self, jobs_dir: Path) -> Control:
        """Return the control.jsonl beside its array."""
        return Control(jobs_dir / "control.jsonl")

    def work(self, control: Control | None = None) -> PartWork:
        """Return its work list, which nothing joins."""
        return PartWork(self.folder, control)

    def place(self) -> str:
        """Describe how far it came."""
        return f"at step {read_progress(self.folder).step}"

    @property
    def stall_seconds(self) -> float:
        """Shortest time without a move after which it counts as stalled."""
        return float(Launch.model_fields["stall_seconds"].default)

    @property
    def has_micro_batch(self) -> bool:
        """False: it begins again as it was."""
        return False

    def note_stall(self, reason: str) -> None:
        """Record in its journal that it stalled and was ended."""
        self._note(Event.PREEMPTED, reason, Kind.STALLED)

    def give_up(self, left: Sequence[Path], reason: str) -> None:
        """Record in its journal that it is lost."""
        self._note(Event.FAILED, reason, Kind.LOST)

    def _note(self, event: Event, reason: str, kind: Kind) -> None:
        """Record how it ended, unless another process works on it."""
        with untrained(self.folder) as is_free:
            if is_free:
                with Journal.open(self.folder) as journal:
                    journal.append(event, reason=reason, kind=kind)

    def rest(self, run_dirs: Sequence[Path]) -> Self:
        """Return the part itself."""
        return self


def _texts(value: JsonValue) -> Iterator[str]:
    """Yield every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


class PartWork:
    """The work list of a part: itself."""

    def __init__(self, folder: Path, control: Control | None) -> None:
        self._folder, self._control = folder, control

    def requests(self, *, ended: bool = False) -> list[JoinRequest]:
        """Return an empty list: nothing joins a part."""
        return []

    def joined(self) -> list[Path]:
        """Return an empty list: nothing joins a part."""
        return []

    def run_dirs(self) -> list[Path]:
        """Return an empty list: a part has no Runs beside its own folder."""
        return []

    def left(self) -> list[Path]:
        """Return the folder of the part unless it is over."""
        if self._control is not None:
            return unfinished([self._folder], self._control)
        return [] if read_progress(self._folder).state == Event.FINISHED else [self._folder]

    def close(self, array: str, *, by_force: bool = False, is_over: bool = True) -> bool:
        """Return True: nothing joins a part."""
        return True
