"""Reading points: errors are refused with their place, and rows are set aside with their reason."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.findings.document import fit_points
from analysis.laws.catalogue import law_named
from analysis.points.read import read_rows
from analysis.points.table import check_points, read_table
from tests.analysis.conftest import checked
from tests.analysis.synthetic import SyntheticStudy

HEADER = "architecture,n_params,tokens,loss"


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def test_csv_parquet_json_lines_and_json_give_the_same_points(tmp_path: Path) -> None:
    table = SyntheticStudy().table(0)
    table.to_csv(tmp_path / "p.csv", index=False)
    table.to_parquet(tmp_path / "p.parquet")
    table.to_json(tmp_path / "p.jsonl", orient="records", lines=True, double_precision=15)
    table.to_json(tmp_path / "p.json", orient="records", double_precision=15)
    places = ["file", "row"]
    expected = read_table(tmp_path / "p.csv").drop(columns=places)
    for name in ("p.parquet", "p.jsonl", "p.json"):
        pd.testing.assert_frame_equal(read_table(tmp_path / name).drop(columns=places), expected)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        pytest.param(f"\ufeff{HEADER}\nx,1e5,1e6,3.0\n", "utf-8", id="byte order mark"),
        pytest.param("architecture;n_params;tokens;loss\r\nx;1e5;1e6;3.0\r\n", "utf-8", id="semicolons"),
        pytest.param("architecture\tn_params\ttokens\tloss\nx\t100000\t1000000\t3\n", "utf-8", id="tabs"),
        pytest.param(f'{HEADER}\n\n"x", 1e5 ,1e6, 3.0\n\n', "utf-8", id="blank lines and spaces"),
        pytest.param("\narchitecture;n_params;tokens;loss;;\nx;1e5;1e6;3;;\n", "utf-8", id="unnamed columns"),
        pytest.param("architecture\tn_params\ttokens\tloss\nx\t1e5\t1e6\t3\n", "utf-16", id="spreadsheet"),
    ],
)
def test_ordinary_variants_of_csv_are_read(tmp_path: Path, text: str, encoding: str) -> None:
    frame = read_table(write(tmp_path / "p.csv", text, encoding))
    assert frame[["architecture", "n_params", "tokens", "loss"]].to_numpy().tolist() == [["x", 1e5, 1e6, 3.0]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        (f"{HEADER}\n", "a header and no rows"),
        (f"{HEADER}\nx,many,1e6,3\n", "row 2, column n_params: 'many' is not a number"),
        (f"{HEADER}\nx,1e5,1e6,nan\n", "row 2: column loss is nan"),
        (f"{HEADER}\nx,1e5,1e6,-3\n", "row 2, column loss: -3 is out of range"),
        (f"{HEADER}\nx,1e5,1e6,inf\n", "row 2: column loss is inf"),
        (f"{HEADER}\nx,1e5,1e6,1e308\n", "row 2, column loss: 1e308 is out of range"),
        (f"{HEADER}\nx,1e308,1e6,3\n", "row 2, column n_params: 1e308 is out of range"),
        (f"{HEADER}\nx,0,1e6,3\n", "row 2: column n_params is 0"),
        (f"{HEADER}\nx,,1e6,3\n", "row 2: column n_params is empty"),
        (f"{HEADER}\n,1e5,1e6,3\n", "row 2: column architecture is empty"),
        ("architecture,n_params,loss\nx,1,3\n", "column tokens is missing"),
        ("architecture,n_params\nx,1e5\n", "columns tokens, loss are missing"),
        (
            "architecture;n_params;tokens;loss\nx;1e5;1e6;3,1\n",
            "'3,1' is not a number; write decimals with a point",
        ),
        (f"{HEADER}\nx,1e5,1e6,3,1\n", "row 2 has 5 cells where the header has 4"),
        (f"{HEADER},loss\nx,1e5,1e6,3,3\n", "the header has the column loss twice"),
        (f"{HEADER},seed\nx,1e5,1e6,3,0.5\n", "row 2, column seed: 0.5 is not a whole number"),
        (f"{HEADER},seed\nx,1e5,1e6,3,-2\n", "row 2, column seed: -2 is below 0"),
        (f"{HEADER}\nx,1e5,1e6,1e-320\n", "row 2, column loss: 1e-320 is out of range"),
        (
            f"{HEADER},annealed\nx,1e5,1e6,3,maybe\n",
            "row 2, column annealed: 'maybe' is neither true nor false",
        ),
        (
            f"{HEADER},run_id\nx,1e5,1e6,3,a\nx,1e5,1e6,3.5,a\n",
            "row 3, column loss: run a at 1000000 tokens has 3.0 in row 2 and 3.5 in row 3",
        ),
        (f"{HEADER},run_id\nx,1e5,1e6,3,a\nx,2e5,1e6,3,a\n", "row 3, column n_params: run a"),
    ],
)
def test_a_bad_table_is_refused_in_one_sentence_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "bad.csv", text)
    with pytest.raises(InputError) as caught:
        check_points(read_table(path))
    message = str(caught.value)
    assert said in message
    assert str(path) in message
    assert "\n" not in message


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("architecture,n_params\nSchö".encode("latin-1"))
    (tmp_path / "fake.parquet").write_bytes(b"PAR0 not parquet")
    for name, said in (("latin.csv", "UTF-8"), ("fake.parquet", "Parquet"), ("none.csv", "no such file")):
        with pytest.raises(InputError, match=said):
            read_table(tmp_path / name)


def test_other_names_are_mapped_and_unknown_ones_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "model,N,D,val\nx,1e5,1e6,3\n")
    mapping = {"architecture": "model", "n_params": "N", "tokens": "D", "loss": "val"}
    assert read_table(path, mapping)["n_params"].tolist() == [1e5]
    with pytest.raises(InputError, match="no column 'M'"):
        read_table(path, mapping | {"n_params": "M"})
    with pytest.raises(InputError, match="size is none of"):
        read_table(path, mapping | {"size": "N"})


def test_a_cluster_falls_back_to_the_run_then_to_size_and_seed(tmp_path: Path) -> None:
    named = write(tmp_path / "a.csv", f"{HEADER},run_id\nx,1e5,1e6,3,a\nx,1e5,2e6,2.9,a\n")
    assert read_table(named)["cluster"].tolist() == ["a", "a"]
    seeded = write(tmp_path / "b.csv", f"{HEADER},seed\nx,1e5,1e6,3,0\nx,1e5,2e6,2.9,0\nx,1e5,1e6,3.1,1\n")
    first, second, third = read_table(seeded)["cluster"]
    assert first == second != third


def test_what_is_set_aside_is_listed_with_its_reason_and_nothing_else_goes(tmp_path: Path) -> None:
    table = SyntheticStudy().table(0)
    table.loc[3, "annealed"] = False
    table.loc[5, "loss"] = 30.0  # far out, and a measurement all the same
    table = pd.concat([table, table.iloc[[7]]])
    table.to_csv(tmp_path / "p.csv", index=False)
    frame = read_table(tmp_path / "p.csv")
    points = check_points(frame)
    assert [(item.row, item.code) for item in points.exclusions] == [(38, "duplicate"), (5, "unannealed")]
    assert len(points.frame) + len(points.exclusions) == len(frame)
    assert 30.0 in points.frame["loss"].tolist()


def test_points_without_names_may_agree_in_size_and_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", f"{HEADER}\nx,1e5,1e6,3.0\nx,1e5,1e6,3.1\nx,1e5,1e6,3.1\n")
    points = check_points(read_table(path))
    assert points.frame["loss"].tolist() == [3.0, 3.1]
    assert [item.code for item in points.exclusions] == ["duplicate"]


def test_a_field_that_is_missing_in_one_line_of_json_is_an_empty_cell(tmp_path: Path) -> None:
    row = '{"architecture": "x", "n_params": 1e5, "tokens": 1e6%s}\n'
    path = write(tmp_path / "p.jsonl", row % ', "loss": 3' + row % "")
    assert [gone.reason for gone in check_points(read_table(path)).exclusions] == ["column loss is empty"]
    with pytest.raises(InputError, match="row 1 is not a JSON object"):
        read_table(write(tmp_path / "list.jsonl", "[1, 2]\n"))
    for text in ("{", "3", "not json"):
        with pytest.raises(InputError, match="JSON"):
            read_table(write(tmp_path / "bad.json", text))


def test_one_value_can_be_given_for_every_row(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "N,D,loss\n1e5,1e6,3\n2e5,1e6,2.9\n")
    columns = {"architecture": "=ours", "n_params": "N", "tokens": "D"}
    assert read_table(path, columns)["architecture"].tolist() == ["ours", "ours"]
    with pytest.raises(InputError, match=r"--column architecture==VALUE"):
        read_table(path, {"n_params": "N", "tokens": "D"})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            "a,1e5,1e6,3\na,2e5,2e6,2.9\n",
            "rows 2 to 3, column architecture: a has 2 rows, fewer than the 5 param",
        ),
        ("a,1e5,1e6,3\n", "row 2, column n_params: a has 100000 in every row"),
        ("".join(f"a,1e5,{k}e6,{k}\n" for k in range(1, 8)), "rows 2 to 8, column n_params: a has 100000"),
    ],
    ids=["two rows", "one row", "one size"],
)
def test_what_no_law_can_be_fitted_to_is_refused_by_row_and_column(
    tmp_path: Path, rows: str, said: str
) -> None:
    law = law_named("chinchilla")
    frame = read_table(write(tmp_path / "p.csv", f"{HEADER}\n{rows}"))
    for points in (check_points(frame), check_points(frame, law)):
        with pytest.raises(InputError, match=re.escape(said)):
            fit_points(points, resamples=100)


def test_an_architecture_with_too_few_points_is_set_aside_while_another_can_be_fitted() -> None:
    table = SyntheticStudy().table(0)
    few = table[(table["architecture"] != "prefix_simba") | (table["cluster"] == "prefix_simba-100000-0")]
    points = checked(few, law_named("chinchilla"))
    assert points.architectures == ("cross_transformer",)
    assert [item.code for item in points.exclusions] == ["too_few"] * 3
    document = fit_points(points, resamples=100)
    (note,) = [note for note in document.notes if note.code == "architecture_left_out"]
    assert "prefix_simba has 100000 in every row" in note.text


def test_the_annealed_row_of_a_run_that_also_has_another_stays(tmp_path: Path) -> None:
    rows = "a,1e5,1e6,3,r,false\na,1e5,1e6,3,r,true\n"
    frame = read_table(write(tmp_path / "p.csv", f"{HEADER},run_id,annealed\n{rows}"))
    points = check_points(frame)
    assert points.frame["row"].tolist() == [3]
    assert [gone.code for gone in points.exclusions] == ["unannealed"]
    with pytest.raises(InputError, match="no point is left"):
        check_points(frame[:1])


def row_text(count: int) -> str:
    return "".join(f"a,{1 + i % 9}e5,{1 + i}e6,3\n" for i in range(count))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "p.csv",
            f"{HEADER},{','.join(map(str, range(10_000)))}\na,1e5,1e6,3\n",
            "the table has 10,004 columns",
        ),
        ("p.csv", f"{HEADER}\na,1e5,1e6,{'9' * 2**21}\n", "line 2 has 2,097,1"),
        ("p.csv", f"{HEADER}\n{row_text(200_001)}", "more than 200,000 rows"),
        ("p.jsonl", f'{{"loss": "{"9" * 2**21}"}}\n', "line 1 has 2,097,1"),
        ("p.jsonl", '{"loss": 3}\n' * 200_001, "more than 200,000 rows"),
        ("p.jsonl", "".join(f'{{"loss": 3, "{i}": 1}}\n' for i in range(10_001)), "10,001 columns"),
        ("p.json", "[" * 100_000 + "]" * 100_000, "cannot be read as JSON"),
    ],
    ids=["columns", "cell", "rows", "line of JSON", "rows of JSON", "names of JSON", "nested JSON"],
)
def test_a_table_of_absurd_size_is_refused_in_one_sentence(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_table(write(tmp_path / name, text))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_parquet_table_of_absurd_size_is_refused_by_its_facts(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"architecture": "a", "n_params": 1e5, "tokens": 1e6, "loss": 3.0}, index=range(200_001)
    )
    table.to_parquet(tmp_path / "p.parquet")
    with pytest.raises(InputError, match="more than 200,000 rows"):
        read_table(tmp_path / "p.parquet")


def test_a_long_name_that_every_row_of_parquet_repeats_is_refused(tmp_path: Path) -> None:
    table = pd.DataFrame({"architecture": ["a" * 5000] * 1000, "n_params": 1e5, "tokens": 1e6, "loss": 3.0})
    table.to_parquet(tmp_path / "p.parquet")
    with pytest.raises(InputError, match="column architecture has a text of 5,000 bytes, and at most 1,000"):
        read_table(tmp_path / "p.parquet")
    with pytest.raises(
        InputError, match="row 2, column architecture: has 5,000 characters, and at most 1,000"
    ):
        read_table(write(tmp_path / "p.csv", f"{HEADER}\n{'a' * 5000},1e5,1e6,3\n"))


def test_a_file_is_refused_by_its_size_before_it_is_read(tmp_path: Path) -> None:
    for name in ("p.csv", "p.jsonl", "p.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)  # takes no room on the disk
        with pytest.raises(InputError, match="the file has 1,099,511,627,776 bytes"):
            read_table(tmp_path / name)


def test_columns_that_no_law_reads_are_not_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", f"{HEADER},note\na,1e5,1e6,3,x\n")
    table = read_rows(path, ("architecture", "loss").__contains__, ("=mine",))
    assert table.header == [*HEADER.split(","), "note", "=mine"]
    assert table.columns == ["architecture", "loss", "=mine"]
    assert table.rows == [(2, ["a", "3", "mine"])]


def test_more_architectures_than_a_comparison_has_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"a{i // 6},{1 + i % 6}e5,{1 + i % 3}e6,3\n" for i in range(6 * 201))
    points = check_points(read_table(write(tmp_path / "p.csv", f"{HEADER}\n{rows}")), law_named("chinchilla"))
    with pytest.raises(InputError, match="the table has 201 architectures, and at most 200"):
        fit_points(points)
