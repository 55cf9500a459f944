"""Exports of Weights & Biases: a row a run, and a column a run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.points.table import check_points, read_table
from tests.analysis.synthetic import SyntheticStudy

MAPPED = {"architecture": "model.arch", "n_params": "n_params", "tokens": "train/tokens", "loss": "eval/loss"}
LONG = """"Name","State","Notes","User","Tags","Created","model.arch","n_params","optim.lr","train/tokens","eval/loss"
"brisk-sun-1","finished","","a","x, y","2026-01-02","ssm","125M","0.0003","2500000000","3.1"
"calm-sea-2","crashed","out of
memory","a","","2026-01-02","ssm","350M","0.0003","","NaN"
"dry-leaf-3","finished","","a","","2026-01-03","transformer","1.3B","0.0003","26,000,000,000","2.5"
"""
OF_A_RUN = '"{0} - eval/loss","{0} - eval/loss__MIN","{0} - eval/loss__MAX"'
WIDE = f""""Step",{OF_A_RUN.format("one - a")},{OF_A_RUN.format("two")}
"100","4.0","4.0","4.0","3.9","3.9","3.9"
"200","3.5","3.5","3.5","","",""
"300","3.2","3.2","3.2","3.0","3.0","3.0"
"400","","","","2.9","2.9","2.9"
"""
RUNS = """Name,State,model.arch,n_params,tokens
one - a,finished,ssm,1e6,3e8
two,finished,transformer,2e6,4e8
three,finished,transformer,3e6,4e8
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_row_a_run_is_read_with_the_names_and_states_of_the_export(tmp_path: Path) -> None:
    points = check_points(read_table(write(tmp_path / "runs.csv", LONG), MAPPED))
    kept = points.frame[["run_id", "architecture", "n_params", "tokens", "loss", "optim.lr"]]
    assert kept.to_numpy().tolist() == [
        ["brisk-sun-1", "ssm", 125e6, 2.5e9, 3.1, "0.0003"],
        ["dry-leaf-3", "transformer", 1.3e9, 26e9, 2.5, "0.0003"],
    ]
    (gone,) = points.exclusions
    assert (gone.row, gone.run_id) == (4, "calm-sea-2")
    assert gone.reason == "its state is crashed, column tokens is empty, column loss is NaN"


def test_a_column_a_run_is_joined_with_the_table_that_describes_the_runs(tmp_path: Path) -> None:
    wide, runs = write(tmp_path / "wide.csv", WIDE), write(tmp_path / "runs.csv", RUNS)
    columns = {"architecture": "model.arch", "loss": "eval/loss", "iterations": "Step"}
    for paths in ([wide, runs], [runs, wide]):
        frame = read_table(paths, columns | {"tokens": "Step"}, units={"tokens": 1e6})
        found = frame[frame["file"] == str(wide)].sort_values(["run_id", "row"])
        assert found[["run_id", "row", "iterations", "loss", "n_params", "annealed"]].to_numpy().tolist() == [
            ["one - a", 2, 100, 4.0, 1e6, False],
            ["one - a", 3, 200, 3.5, 1e6, False],
            ["one - a", 4, 300, 3.2, 1e6, True],
            ["two", 2, 100, 3.9, 2e6, False],
            ["two", 4, 300, 3.0, 2e6, False],
            ["two", 5, 400, 2.9, 2e6, True],
        ]


def test_a_run_that_is_only_described_is_a_row_set_aside(tmp_path: Path) -> None:
    wide, runs = (
        write(tmp_path / "wide.csv", WIDE),
        write(tmp_path / "runs.csv", RUNS.replace("tokens", "tokens,loss").replace("e8\n", "e8,\n")),
    )
    points = check_points(read_table([wide, runs], {"architecture": "model.arch"}))
    assert points.frame["tokens"].tolist() == [3e8, 4e8]
    assert points.frame[["run_id", "loss"]].to_numpy().tolist() == [["one - a", 3.2], ["two", 2.9]]
    assert [(gone.file, gone.row, gone.code) for gone in points.exclusions if gone.code != "unannealed"] == [
        (str(runs), 4, "unusable")
    ]


def test_every_step_of_a_constant_rate_is_a_point_on_request(tmp_path: Path) -> None:
    wide = write(tmp_path / "wide.csv", WIDE)
    columns = {"architecture": "=ssm", "n_params": "=1M", "tokens": "Step", "annealed": "=true"}
    frame = read_table(wide, columns, units={"tokens": 1e6})
    assert len(check_points(frame).frame) == 6
    assert frame["tokens"].tolist()[:2] == [1e8, 1e8]


@pytest.mark.parametrize(
    ("columns", "runs", "said"),
    [
        ({"loss": "train/loss"}, RUNS, "no metric 'train/loss' of the runs is there; it has eval/loss"),
        ({}, RUNS + "two,finished,ssm,1,1\n", "row 5, column Name: run two was described by an earlier row"),
        ({}, "Name,n_params\ntwo,1e6\n", "column architecture, tokens"),
    ],
)
def test_an_export_that_does_not_fit_together_is_refused(
    tmp_path: Path, columns: dict[str, str], runs: str, said: str
) -> None:
    paths = [write(tmp_path / "wide.csv", WIDE), write(tmp_path / "runs.csv", runs)]
    with pytest.raises(InputError) as caught:
        read_table(paths, columns)
    assert said in str(caught.value).replace("columns", "column")


def test_a_wide_export_of_a_study_is_fitted_like_its_points(tmp_path: Path) -> None:
    table = SyntheticStudy().table(0)
    table["run_id"] = table["cluster"]
    wide = table.pivot_table(index="iterations", columns="run_id", values="loss")
    wide = wide.rename(columns=lambda name: f"{name} - eval/loss").rename_axis("Step").reset_index()
    wide.to_csv(tmp_path / "wide.csv.gz", index=False)
    about = table[["run_id", "architecture", "n_params"]].drop_duplicates().rename(columns={"run_id": "Name"})
    about.assign(State="finished").to_csv(tmp_path / "runs.csv", index=False)
    columns = {"iterations": "Step", "tokens": "Step", "annealed": "=true"}
    frame = read_table([tmp_path / "wide.csv.gz", tmp_path / "runs.csv"], columns, units={"tokens": 16_000.0})
    order, names = ["run_id", "tokens"], ["architecture", "n_params", "iterations", "loss"]
    expected = table.sort_values(order)[names].reset_index(drop=True)
    found = frame.sort_values(order)[names].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
