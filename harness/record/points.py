"""The Points table: from the journals, which are the truth, and not out of a tracker, which may be gone.

A row is a finished Run. Evaluations made on the way can be had too: they were measured before the learning rate had
decayed, so they are biased upwards and say annealed=false. The run id of a trunk's evaluations is the Series.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from harness.record.journal import Progress, read_progress
from harness.record.result import Result
from harness.record.root import Root
from harness.record.status import RunState, RunStatus
from ssmttm.errors import InputError


@dataclass(frozen=True)
class Point:
    """One row of the Points table; its identity is (run_id, tokens)."""

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


COLUMNS = [field.name for field in fields(Point)]
MOST_NAMED = 5
"""Runs of which a note says why they have no point."""


def points_of(rows: Sequence[RunStatus], root: Root, *, on_the_way: bool = False) -> Iterator[Point]:
    """The points of a study in the order of its rows; a Series' own evaluations come before its first Run.

    Evaluations take parameters and FLOPs a token from a finished Run of their Series; where nothing of a Series has
    finished, it gives no rows.
    """
    if not on_the_way:
        yield from (_final(row) for row in rows if row.state is RunState.DONE)
        return
    results = {row.series_id: _result(row) for row in reversed(rows) if row.state is RunState.DONE}
    seen: set[str] = set()
    for row in rows:
        result = results.get(row.series_id)
        if result is not None and row.series_id not in seen:
            seen.add(row.series_id)
            yield from _evaluations(row, row.series_id, read_progress(root.series(row.series_id)), result)
        if result is not None:
            yield from _evaluations(row, row.run_id, read_progress(root.run(row.run_id)), result)
        if row.state is RunState.DONE:
            yield _final(row)


def without_points(rows: Sequence[RunStatus]) -> str:
    """Say in a sentence which Runs of a study have no final loss and why; empty where all have one."""
    left = [row for row in rows if row.state is not RunState.DONE]
    if not left:
        return ""
    counts = Counter(row.state for row in left)
    named = [f"{row.run_id} {row.state} ({row.reason})" for row in left if row.reason][:MOST_NAMED]
    text = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{len(left)} of the study's {len(rows)} runs have no point: {text}{'; '.join(['', *named])}."


def cells(points: Sequence[Point]) -> list[tuple[int, tuple[object, ...]]]:
    """Rows with their numbers, as the analysis takes a table."""
    return [(number, tuple(asdict(point).values())) for number, point in enumerate(points, start=1)]


def write_table(points: Iterator[Point], out: Path | None, standard_output: TextIO) -> None:
    """Write CSV to standard output, or CSV or Parquet to a file by its name's ending; raises InputError for another."""
    if out is None:
        write_csv(points, Point, standard_output)
    elif out.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame([asdict(point) for point in points], columns=COLUMNS).to_parquet(out, index=False)
    else:
        with out.open("w", encoding="utf-8", newline="") as file:
            write_csv(points, Point, file)


def check_ending(out: Path | None) -> None:
    """Raise InputError for a file that is neither CSV nor Parquet, before any work is done for it."""
    if out is not None and out.suffix not in {".csv", ".parquet"}:
        raise InputError(f"--out {out}: ends in neither .csv nor .parquet")


def write_csv(rows: Iterable[Any], kind: type[Any], file: TextIO) -> None:
    """Write rows of a dataclass as CSV, its fields as columns."""
    names = [field.name for field in fields(kind)]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)


def _final(row: RunStatus) -> Point:
    result = _result(row)
    return Point(
        run_id=row.run_id,
        iterations=row.point.run.iterations,
        tokens=result.tokens,
        flops=result.flops,
        loss=result.loss,
        annealed=result.annealed,
        **_common(row, result),
    )


def _evaluations(row: RunStatus, identity: str, progress: Progress, result: Result) -> Iterator[Point]:
    for step, event in sorted(progress.evals.items()):
        tokens = event.get("tokens")
        if not isinstance(tokens, int):
            continue
        yield Point(
            run_id=identity,
            iterations=step,
            tokens=tokens,
            flops=result.flops / result.tokens * tokens,
            loss=float(event["loss"]),
            annealed=False,
            **_common(row, result),
        )


def _common(row: RunStatus, result: Result) -> dict[str, Any]:
    return {
        "cluster": row.series_id,
        "architecture": row.point.architecture,
        "size": row.point.size,
        "n_params": result.n_params,
        "n_params_non_embedding": result.n_params_non_embedding,
        "seed": row.point.run.seed,
    }


def _result(row: RunStatus) -> Result:
    assert row.result is not None
    return Result.of_event(row.result)
