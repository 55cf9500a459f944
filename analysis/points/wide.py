"""Curves exported with a column for each run, as Weights & Biases does, turned into a row for each run and step.

The header is `Step, "RUN - METRIC", "RUN - METRIC__MIN", ...`. The last loss of a run is its final one; those before it
were taken mid-run, before the learning rate has decayed. Sizes and architectures come from a second table, which
describes the runs by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.errors import InputError
from analysis.points.files import Row, Table, listed, refuse_rows
from analysis.points.where import plain

BETWEEN = " - "
RANGE = ("__MIN", "__MAX")
RUN, FINAL = "Name", "annealed"


def of_a_run(name: str) -> bool:
    """Return True for the name of a run's column: RUN - METRIC, and no range of it."""
    return BETWEEN in name and not name.endswith(RANGE)


def is_wide(table: Table, added: Sequence[str]) -> bool:
    """Return True if every column but the first, and but those `added`, holds a metric of one run."""
    names = [name for name in table.header[1:] if name and name not in added]
    return bool(names) and all(BETWEEN in name for name in names)


def long_form(
    tables: Sequence[Table], sources: Sequence[str], columns: Mapping[str, str], added: Sequence[str]
) -> tuple[list[Table], list[str]]:
    """Turn the wide tables into long ones, with the columns by which the other tables describe their runs.

    Those rows of the other tables are no points of their own. `columns` maps this project's names to the files'.
    Returns the tables that have rows, and the source of each.
    """
    wide = [is_wide(table, added) for table in tables]
    if not any(wide):
        return list(tables), list(sources)
    found = [
        _melted(table, source, columns, added) if one else table
        for table, source, one in zip(tables, sources, wide, strict=True)
    ]
    curves = [table for table, one in zip(found, wide, strict=True) if one]
    runs = {str(cells[1]) for table in curves for _, cells in table.rows}
    about: dict[str, dict[str, object]] = {}
    for k, (table, one) in enumerate(zip(found, wide, strict=True)):
        name = next((name for name in (columns.get("run_id"), RUN, "run_id") if name in table.columns), None)
        if one or name is None:
            continue
        j, rest = table.columns.index(name), []
        for number, cells in table.rows:
            run = plain(cells[j])
            if run not in runs:
                rest.append((number, cells))
            elif run in about:
                raise InputError(
                    f"{sources[k]}: row {number}, column {name}: run {run} was described by an earlier row; give each "
                    "run its own name."
                )
            else:
                about[run] = dict(zip(table.columns, cells, strict=True))
        found[k] = table._replace(rows=rest)
    whole = [columns.get(name, name) for name in ("tokens", "iterations", "flops")]
    found = [
        _described(table, about, whole) if one else table for table, one in zip(found, wide, strict=True)
    ]
    names = [name for table, one in zip(found, wide, strict=True) if one for name in table.columns]
    kept = [k for k, table in enumerate(found) if wide[k] or table.rows]
    return [found[k] if wide[k] else _completed(found[k], names) for k in kept], [sources[k] for k in kept]


def _melted(table: Table, source: str, columns: Mapping[str, str], added: Sequence[str]) -> Table:
    """Return a row for each run and step with a loss: the step, the run, its metrics, and whether it is the last."""
    axis = table.header[0]
    places: dict[str, dict[str, int]] = {}
    metrics: dict[str, None] = {}
    for j, name in enumerate(table.columns):
        if of_a_run(name):
            run, _, metric = name.rpartition(BETWEEN)
            places.setdefault(run, {})[metric] = j
            metrics[metric] = None
    named = columns.get("loss", "loss")
    own = [metric for metric in metrics if metric != "_step"]
    if named not in metrics and "loss" not in columns and len(own) == 1 and "loss" in own[0].lower():
        named = own[0]
    if named not in metrics:
        raise InputError(
            f"{source}: no metric {named!r} of the runs is there; it has {listed(own)} (name the loss with "
            "--column loss=METRIC)."
        )
    at = table.columns.index(axis) if axis in table.columns else None
    constants = [table.columns.index(name) for name in added if name in table.columns]
    last = {
        run: number
        for number, cells in table.rows
        for run, of in places.items()
        if named in of and plain(cells[of[named]])
    }
    rows: list[Row] = []
    for number, cells in table.rows:
        for run, of in places.items():
            if named in of and plain(cells[of[named]]):
                values = [cells[of[metric]] if metric in of else None for metric in metrics]
                step = cells[at] if at is not None else None
                kept = (cells[j] for j in constants)
                rows.append((number, [step, run, *values, number == last[run], *kept]))
        refuse_rows(len(rows), source)
    titles = ["loss" if metric == named and "loss" not in columns else metric for metric in metrics]
    header = [axis, RUN, *titles, FINAL, *(table.columns[j] for j in constants)]
    return table._replace(header=header, columns=header, rows=rows)


def _described(table: Table, about: Mapping[str, Mapping[str, object]], whole: Sequence[str]) -> Table:
    """Add to each row the fields that describe its run; those in `whole`, such as its tokens, to its last row only."""
    fields = dict.fromkeys(name for of in about.values() for name in of)
    new = [name for name in fields if name not in table.columns]
    last = table.columns.index(FINAL)
    rows: list[Row] = []
    for number, cells in table.rows:
        own = about.get(str(cells[1]), {})
        added = (own.get(name) if cells[last] or name not in whole else None for name in new)
        rows.append((number, [*cells, *added]))
    header = [*table.columns, *new]
    return table._replace(header=header, columns=header, rows=rows)


def _completed(table: Table, names: Sequence[str]) -> Table:
    """Add empty cells to rows of runs without a curve, so that they are set aside and listed for what they lack."""
    new = [name for name in dict.fromkeys(names) if name not in table.header]
    rows: list[Row] = [(number, [*cells, *[None] * len(new)]) for number, cells in table.rows]
    return table._replace(header=[*table.header, *new], columns=[*table.columns, *new], rows=rows)
