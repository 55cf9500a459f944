"""Journals as a worker writes them, without training."""

from __future__ import annotations

import json
import shutil
from typing import Any

from harness.record.registry import ResolvedStudy
from harness.record.result import describe_result
from harness.record.root import Root

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
