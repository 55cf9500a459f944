"""Foreign tables on the command line: several files, units, conditions and the best of a sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from tests.analysis.synthetic import SyntheticStudy
from tests.conftest import Command


@pytest.fixture
def tables(tmp_path: Path) -> list[Path]:
    """A file for each architecture, sizes in millions, each run at two rates, and one run that crashed."""
    table = SyntheticStudy(seeds=(1, 1, 1, 1)).table(0)
    paths = []
    for name, rows in table.groupby("architecture"):
        slow = rows.assign(lr=1e-4, loss=rows["loss"] * 1.02, run_id=rows["run_id"] + "-slow")
        both = pd.concat([rows.assign(lr=3e-4), slow]).drop(columns=["architecture", "cluster", "seed"])
        both = both.assign(n_params=both["n_params"] / 1e6, optimizer="adamw", state="finished", width=7)
        both["context"] = 512 if "simba" in str(name) else 1024
        extra = both.iloc[:2].assign(
            run_id=["lost", "other"], state=["crashed", "finished"], loss=[None, 2.0]
        )
        extra["optimizer"] = ["adamw", "sgd"]
        paths.append(tmp_path / f"{name}.csv")
        pd.concat([both, extra]).to_csv(paths[-1], index=False)
    return paths


def test_one_command_reads_files_of_sweeps_and_lists_what_it_left_out(
    tables: list[Path], ssmscale: Command, tmp_path: Path
) -> None:
    points = [word for path in tables for word in ("--points", path)]
    asked = (*points, "--column", "architecture=@file", "--where", "optimizer=adamw")
    said = ssmscale("fit", *asked)
    said.assert_refused("column n_params has values below a thousand (0.1, 0.3, 1, 3)", "--unit n_params=M")
    asked += ("--unit", "n_params=M")
    ssmscale("fit", *asked).assert_refused("lr (0.0001, 0.0003)", "--best lr")
    document = ssmscale("fit", *asked, "--best", "lr", "--json").document
    assert {name: fit["n_points"] for name, fit in document["architectures"].items()} == {
        "cross_transformer": 12,
        "prefix_simba": 12,
    }
    gone = document["exclusions"]
    assert [one["code"] for one in gone].count("not_best") == 24
    assert [(Path(one["file"]).name, one["row"]) for one in gone if one["code"] == "unfinished"] == [
        ("cross_transformer.csv", 26),
        ("prefix_simba.csv", 26),
    ]
    assert "2 of 52 rows do not fulfil optimizer=adamw" in str(document["notes"])
    out = tmp_path / "report"
    assert ssmscale("report", *asked, "--best", "lr", "--out", out).status == 0
    assert json.loads((out / "fit.json").read_text())["exclusions"] == gone
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.split('<table id="points">')[1].split("</table>")[0].count("<td>512</td>") == 12
    table = page.split('<table id="exclusions">')[1]
    assert len(re.findall("<tr>", table.split("</table>")[0])) >= len(gone)
    assert "its state is crashed, column loss is empty" in table


def test_options_of_tables_are_refused_for_a_study(ssmscale: Command) -> None:
    for option, value in (("--column", "a=b"), ("--unit", "n_params=B"), ("--tokens-from", "flops/6n")):
        ssmscale("fit", "tiny", option, value).assert_refused("give them with --points FILE")
    ssmscale("fit", "--points", "p.csv", "--unit", "n_params=furlongs").assert_refused("is no unit")
