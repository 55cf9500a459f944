"""Conditions choose rows by any column, and are never code."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.errors import InputError
from analysis.points.table import check_points, read_table

TABLE = """arch,n_params,tokens,loss,config.optim/name,lr,tied,note
a,100M,1e9,3.0,adamw,3e-4,True,x
a,200M,1e9,2.9,adamw,1e-3,False,
a,300M,1e9,2.8,muon,0.0003,True,=1
b,100M,1e9,bad,sgd,,true,y
"""
COLUMNS = {"architecture": "arch"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "p.csv").write_text(TABLE, encoding="utf-8")
    return tmp_path / "p.csv"


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        (["config.optim/name=adamw"], [2, 3]),
        (["config.optim/name != sgd"], [2, 3, 4]),
        (["lr=0.0003"], [2, 4]),
        (["lr<=0.0003"], [2, 4]),
        (["lr>3e-4"], [3]),
        (["n_params>=200M", "architecture==a"], [3, 4]),
        (["tied=true", "loss!=bad"], [2, 4]),
        (["note=", "arch=a"], [3]),
        (["note==1"], []),
        (["note===1"], [4]),
    ],
)
def test_rows_are_chosen_before_their_cells_are_read(path: Path, where: list[str], rows: list[int]) -> None:
    if not rows:
        with pytest.raises(InputError, match="no row fulfils it; column note has x, "):
            read_table(path, COLUMNS, where=where)
        return
    frame = read_table(path, COLUMNS, where=where)
    assert frame["row"].tolist() == rows
    (note,) = [note for note in check_points(frame, best=["lr"]).notes if note.code == "where"]
    assert f"{4 - len(rows)} of 4 rows" in note.text


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("optimizer=adamw", "has no column optimizer; it has arch, n_params"),
        ("lr", "expected COLUMN=VALUE"),
        ("lr<=small", "'small' is not a number"),
        ("config.optim/name<3", "row 2, column config.optim/name: 'adamw' is not a number"),
        ("__import__('os').system('true')=0", "has no column"),
    ],
)
def test_a_condition_that_cannot_be_tested_is_refused(path: Path, where: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_table(path, COLUMNS, where=[where])
    assert said in str(caught.value)
    assert f"--where {where}" in str(caught.value)
