"""The Points table, read from the journals.

A row is a finished Run, or with `on_the_way` an evaluation before the learning rate has decayed: its loss is biased
upwards, and it has annealed=false. The run id of a trunk's evaluation is its Series.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

from harness.common.disk import existing
from harness.record.journal import read_progress
from harness.record.result import Result
from harness.record.root import Root
from harness.record.status import RunState, RunStatus
from ssmttm.errors import InputError


@dataclass(frozen=True)
class Point:
    """One row of the Points table; its identity is (run_id, tokens)."""

    run_id: str
    cluster: str
    """The Series; the errors of its rows are correlated."""
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
    lr: float
    batch: int
    frames: int
    loss_codebooks: tuple[float, ...] = ()
    """Losses of the single codebooks in nats a token, columns loss_q0, loss_q1, ...; empty if there is one codebook."""


COLUMNS = [field.name for field in fields(Point) if field.name != "loss_codebooks"]
"""Columns that every table has; those of the codebooks follow."""


def points_of(rows: Sequence[RunStatus], root: Root, *, on_the_way: bool = False) -> Iterator[Point]:
    """Yield the points of a study in the order of its rows; a Series' own evaluations precede its first Run.

    Evaluations take parameters and FLOPs a token from a finished Run of their Series; without one they are left out.
    """
    final = {row.run_id: _final(row) for row in rows if row.state is RunState.DONE}
    of_series = {row.series_id: final[row.run_id] for row in reversed(rows) if row.run_id in final}
    seen: set[str] = set()
    for row in rows:
        like = of_series.get(row.series_id)
        if on_the_way and like is not None:
            if row.series_id not in seen:
                seen.add(row.series_id)
                yield from _evaluations(row.series_id, root.series(row.series_id), like)
            yield from _evaluations(row.run_id, root.run(row.run_id), like)
        if row.run_id in final:
            yield final[row.run_id]


def without_points(rows: Sequence[RunStatus]) -> str:
    """Return a sentence that counts the Runs without a final loss, with some reasons; empty if there are none."""
    left = [row for row in rows if row.state is not RunState.DONE]
    if not left:
        return ""
    counts = Counter(row.state for row in left)
    named = [f"{row.run_id} {row.state} ({row.reason})" for row in left if row.reason][:5]
    text = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{len(left)} of the study's {len(rows)} runs have no point: {text}{'; '.join(['', *named])}."


def header_of(points: Sequence[Point]) -> list[str]:
    """Return the columns of a table of points, with those of its codebooks."""
    return [*COLUMNS, *(f"loss_q{book}" for book in range(_codebooks(points)))]


def rows_of(points: Sequence[Point]) -> Iterator[tuple[object, ...]]:
    """Yield the cells of each point under `header_of`; None for the codebooks of a point that lacks their losses."""
    books = _codebooks(points)
    for point in points:
        of_books = point.loss_codebooks if len(point.loss_codebooks) == books else (None,) * books
        yield (*(getattr(point, name) for name in COLUMNS), *of_books)


def _codebooks(points: Sequence[Point]) -> int:
    return max((len(point.loss_codebooks) for point in points), default=0)


def write_table(found: Iterable[Point], out: Path | None, standard_output: TextIO) -> None:
    """Write CSV to standard output, or CSV or Parquet to a file by its suffix, which `check_output` has checked."""
    points = list(found)
    if out is None:
        _write_rows(rows_of(points), header_of(points), standard_output)
    elif out.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(rows_of(points), columns=header_of(points)).to_parquet(out, index=False)
    else:
        with out.open("w", encoding="utf-8", newline="") as file:
            _write_rows(rows_of(points), header_of(points), file)


def check_output(out: Path | None, *endings: str) -> None:
    """Raise InputError unless the name of a file has one of these endings and it can be written: before long work."""
    if out is None:
        return
    if out.suffix not in endings:
        raise InputError(f"--out {out}: the name must end in {' or '.join(endings)}")
    folder = existing(out.absolute().parent)
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {out}: nothing can be written in {folder} ({error.strerror})") from error


def write_csv(rows: Iterable[Any], kind: type[Any], file: TextIO) -> None:
    """Write the rows of a dataclass as CSV, with its fields as columns."""
    names = [field.name for field in fields(kind)]
    _write_rows(([getattr(row, name) for name in names] for row in rows), names, file)


def _write_rows(rows: Iterable[Sequence[object]], names: Sequence[str], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)


def _final(row: RunStatus) -> Point:
    assert row.result is not None
    result = Result.of_event(row.result)
    run = row.point.run
    return Point(
        run_id=row.run_id,
        cluster=row.series_id,
        architecture=row.point.architecture,
        size=row.point.size,
        n_params=result.n_params,
        n_params_non_embedding=result.n_params_non_embedding,
        iterations=run.iterations,
        tokens=result.tokens,
        flops=result.flops,
        loss=result.loss,
        seed=run.seed,
        annealed=result.annealed,
        lr=run.optimiser.lr,
        batch=run.batch,
        frames=run.frames,
        loss_codebooks=_of_books(result.loss_codebooks),
    )


def _evaluations(identity: str, folder: Path, like: Point) -> Iterator[Point]:
    for step, event in sorted(read_progress(folder).evals.items()):
        tokens = event.get("tokens")
        if isinstance(tokens, int):
            yield replace(
                like,
                run_id=identity,
                iterations=step,
                tokens=tokens,
                flops=like.flops / like.tokens * tokens,
                loss=float(event["loss"]),
                annealed=False,
                loss_codebooks=_of_books(event.get("loss_codebooks", ())),
            )


def _of_books(losses: Sequence[float]) -> tuple[float, ...]:
    """Return the losses of codebooks; those of one codebook are the loss itself."""
    return tuple(losses) if len(losses) > 1 else ()
