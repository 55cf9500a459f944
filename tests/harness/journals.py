"""Journals as a worker writes them, without the training, for tests and measurements of their readers."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.common.jsonl import Damage, LineReader
from harness.common.process import identify_process
from harness.common.validation import validate
from harness.record.journal import Event, Journal, attempt_file, attempts, check_for
from harness.record.registry import ResolvedStudy, register, resolve
from harness.record.result import describe_result
from harness.record.root import Root, write_run, write_series
from harness.record.status import RunStatus, StatusReader
from harness.study.grid import GridPoint
from harness.study.run import Run
from harness.study.schema import Study
from tests.studies import Fields

WHO: dict[str, Any] = {"dispatcher": "test", "job_id": "7", "commit": "c" * 40, "layout": {"ranks": 1}}


def registered(root: Root, fields: Fields) -> ResolvedStudy:
    """Register a study as its submission does."""
    resolved = resolve(validate(Study, fields, "test"), root, "test")
    register(resolved)
    return resolved


def rows_of(root: Root, fields: Fields) -> list[RunStatus]:
    study = validate(Study, fields, "test")
    return StatusReader(root, study.name).read(resolve(study, root, "test").points)


def begin_series(root: Root, run: Run, **more: Any) -> Journal:
    """Begin an attempt on the trunk of a Run."""
    journal = Journal.open(write_series(root, run))
    journal.append(Event.STARTED, **{**identify_process(), **WHO, **more})
    return journal


def begin_run(root: Root, run: Run, **more: Any) -> Journal:
    """Begin an attempt on a Run."""
    journal = Journal.open(write_run(root, run))
    journal.append(Event.STARTED, **{**identify_process(), **WHO, **more})
    return journal


def log_steps(journal: Journal, steps: Iterable[int], **more: Any) -> None:
    for step in steps:
        journal.append(Event.STEP, **{**measured_at(step), **more})


def measured_at(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5.0 - step / 1000,
        "lr": 3e-3,
        "tokens": step * 800,
        "tokens_per_second": 1000.5,
        "grad_norm": 1.25,
    }


def finish(journal: Journal, run: Run, loss: float = 4.0, **more: Any) -> None:
    """End a Run with its result."""
    result = {
        "loss": loss,
        "loss_codebooks": [loss, loss],
        "step": run.iterations,
        "tokens": run.iterations * 800,
        "flops": run.iterations * 1e6,
        "n_params": 1000 + run.model.n_blocks,
        "n_params_non_embedding": 900 + run.model.n_blocks,
        "n_params_text_encoder": 0,
        "n_params_null_condition": 0,
        "annealed": True,
    }
    journal.append(Event.FINISHED, **{**result, **more})
    journal.close()


def write_finished(root: Root, points: Sequence[GridPoint], steps: int = 20) -> None:
    """Write the journals of a finished study: every Run and every trunk, each with so many logged steps."""
    seen: set[str] = set()
    longest = max(point.run.iterations for point in points)
    for point in points:
        run = point.run
        if run.series_id not in seen:
            seen.add(run.series_id)
            trunk = begin_series(root, run)
            log_steps(trunk, sorted({longest * 4 * k // (5 * steps) for k in range(1, steps + 1)} - {0}))
            trunk.append(Event.FINISHED)
            trunk.close()
        journal = begin_run(root, run)
        log_steps(journal, range(max(1, run.iterations - steps + 1), run.iterations + 1))
        finish(journal, run)


def read_events(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield every event of a directory, the oldest attempt first, each with its attempt's number."""
    for attempt in attempts(directory):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            for line in LineReader(attempt_file(directory, attempt)).read(check_for(directory)):
                if not isinstance(line, Damage):
                    yield {**line, "attempt": attempt}


ELSEWHERE = {"host": "elsewhere", "pid": 7, "process_started": 1.0, "job_id": "7"}
"""A process of another machine."""


def result_of(resolved: ResolvedStudy, number: int, loss: float) -> dict[str, Any]:
    run = resolved.points[number].run
    measured = {"loss": loss, "loss_codebooks": [loss, loss], "step": run.iterations, "tokens": 100}
    return {**measured, **describe_result(run, 100, 1e6)}


def written(root: Root, run_id: str, attempts: list[bytes]) -> None:
    """Write the journal of a Run, with these attempts and no others."""
    folder = root.run(run_id) / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, content in enumerate(attempts, 1):
        (folder / f"{number:04d}.jsonl").write_bytes(content)


def finish_all(resolved: ResolvedStudy) -> None:
    for number, point in enumerate(resolved.points):
        events = [
            {"t": 1.0 + number, "event": "started", "step": 4, **ELSEWHERE},
            {"t": 2.0, "event": "finished", **result_of(resolved, number, 3.0)},
        ]
        written(resolved.root, point.run.run_id, [lines_of(events)])


def lines_of(events: list[Any]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)
