"""Tables as people have them: the same points, whatever the form of the file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.findings.document import fit_points
from analysis.laws.catalogue import law_named
from analysis.points import files
from analysis.points.checks import seed_noise
from analysis.points.table import check_points, read_table
from tests.analysis.conftest import checked
from tests.analysis.synthetic import SyntheticStudy

COLUMNS = ["architecture", "n_params", "tokens", "flops", "loss", "run_id"]
HEADER = "architecture,n_params,tokens,loss"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["sep", "comment", "suffixes"])
def test_the_cases_are_the_same_points_to_the_digits_printed(cases: Path, name: str) -> None:
    expected = read_table(cases / "plain.csv")[COLUMNS]
    pd.testing.assert_frame_equal(read_table(cases / f"{name}.csv")[COLUMNS], expected, rtol=1e-12)


def test_rows_are_numbered_by_their_line_also_below_comments_and_in_quotes(tmp_path: Path) -> None:
    text = f'# made by hand\nsep=,\n\n{HEADER}\n# the small ones\n"a\n#b",1e5,1e6,3\nc,1e6,1e6,x\n'
    assert "row 8, column loss: 'x' is not a number" in refusal(
        lambda: read_table(write(tmp_path / "p.csv", text))
    )
    frame = read_table(write(tmp_path / "p.csv", text.replace(",x\n", ",2\n")))
    assert frame["architecture"].tolist() == ["a\n#b", "c"]
    assert [note.code for note in check_points(frame).notes] == ["comment_lines"]


def test_a_header_that_is_a_comment_names_the_columns(tmp_path: Path) -> None:
    table = np.array([[1e5, 1e6, 3.0], [2e5, 1e6, 2.9]])
    np.savetxt(tmp_path / "p.csv", table, delimiter=",", header="by hand\nn_params,tokens,loss")
    frame = read_table(tmp_path / "p.csv", {"architecture": "=a"})
    assert frame[["row", "n_params", "loss"]].to_numpy().tolist() == [[3, 1e5, 3.0], [4, 2e5, 2.9]]


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl"])
def test_a_compressed_table_is_read_and_one_that_grows_too_large_is_refused(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SyntheticStudy().table(0)[["architecture", "n_params", "tokens", "loss"]]
    plain, packed = tmp_path / f"p.{ending}", tmp_path / f"q.{ending}.gz"
    if ending.startswith("json"):
        table.to_json(plain, orient="records", lines=ending == "jsonl", double_precision=15)
    else:
        table.to_csv(plain, sep="\t" if ending == "tsv" else ",", index=False)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pd.testing.assert_frame_equal(
        read_table(packed).drop(columns="file"), read_table(plain).drop(columns="file")
    )
    packed.write_bytes(gzip.compress(b" " * 2**28 + b"\n" * 2**10))
    assert "decompresses to more than" in refusal(lambda: read_table(packed))
    packed.write_bytes(gzip.compress(plain.read_bytes())[:-20])
    assert "cannot be decompressed" in refusal(lambda: read_table(packed))
    assert files.MAX_JSON_BYTES < files.MAX_BYTES == 2**28


ROWS = [
    {"architecture": "a", "n_params": 1e5, "tokens": 1e6, "loss": 3.0},
    {"architecture": "b", "n_params": 2e5, "tokens": 2e6, "loss": 2.5},
]
BY_COLUMN = {name: [row[name] for row in ROWS] for name in ROWS[0]}
BY_INDEX = {name: {str(k): cell for k, cell in enumerate(cells)} for name, cells in BY_COLUMN.items()}
SPLIT = {"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]}
OF_NESTED = {
    "architecture": "config.arch",
    "n_params": "config.n_params",
    "tokens": "summary.tokens",
    "loss": "summary.eval.loss",
}


def nested(of: dict[str, Any]) -> dict[str, Any]:
    """Arrange fields, or columns, as Weights & Biases arranges those of a run."""
    return {
        "config": {"arch": of["architecture"], "n_params": of["n_params"]},
        "summary": {"tokens": of["tokens"], "eval": {"loss": of["loss"]}},
    }


@pytest.mark.parametrize(
    ("document", "columns"),
    [
        pytest.param(ROWS, {}, id="rows"),
        pytest.param(BY_COLUMN, {}, id="columns as lists"),
        pytest.param(BY_INDEX, {}, id="columns by index"),
        pytest.param({"first": ROWS[0], "second": ROWS[1]}, {}, id="rows by name"),
        pytest.param(SPLIT, {}, id="split"),
        pytest.param({"version": 2, "runs": ROWS}, {}, id="rows within"),
        pytest.param([nested(row) for row in ROWS], OF_NESTED, id="nested rows"),
        pytest.param({"r1": nested(ROWS[0]), "r2": nested(ROWS[1])}, OF_NESTED, id="nested rows by name"),
        pytest.param(nested(BY_COLUMN), OF_NESTED, id="nested columns"),
        pytest.param(nested(BY_INDEX), OF_NESTED, id="nested columns by index"),
    ],
)
def test_json_is_read_by_rows_and_by_columns_nested_or_not(
    tmp_path: Path, document: object, columns: dict[str, str]
) -> None:
    frame = read_table(write(tmp_path / "p.json", json.dumps(document)), columns)
    assert frame[list(ROWS[0])].to_dict("records") == ROWS


def test_json_columns_of_unequal_length_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", json.dumps(BY_COLUMN | {"loss": [3.0]}))
    assert "columns of equal length" in refusal(lambda: read_table(path))


def test_an_index_of_parquet_that_has_a_name_is_a_column(tmp_path: Path) -> None:
    table = pd.DataFrame(ROWS)
    for index in ("architecture", ["architecture", "n_params"]):
        table.set_index(index).to_parquet(tmp_path / "p.parquet")
        assert read_table(tmp_path / "p.parquet")[list(ROWS[0])].to_dict("records") == ROWS


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("125M", 125e6),
        ("1.3B", 1.3e9),
        ("1.3 b", 1.3e9),
        ("0.5G", 0.5e9),
        ("2T", 2e12),
        ("300k", 3e5),
        ("1,300,000", 1.3e6),
        ("1,300", 1300.0),
        ("1.3e9", 1.3e9),
        ("30.4167M", 3.04167e7),
    ],
)
def test_sizes_are_read_as_people_write_them(tmp_path: Path, text: str, number: float) -> None:
    frame = read_table(write(tmp_path / "p.csv", f'{HEADER}\nx,"{text}","{text}",3\n'))
    assert frame[["n_params", "tokens"]].to_numpy().tolist() == [[number, number]]


@pytest.mark.parametrize("text", ["1.3Q", "1,30", "13,0000", "M", "1.3BB", "0x10", "1,3", "1,300,00"])
def test_texts_that_are_no_sizes_are_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "p.csv", f'{HEADER}\nx,"{text}",1e6,3\n')
    assert f"row 2, column n_params: '{text}' is not a number" in refusal(lambda: read_table(path))


def test_a_comma_that_may_be_a_decimal_one_is_not_guessed_at(tmp_path: Path) -> None:
    text = "architecture;n_params;tokens;loss\nx;%s;1e6;3\n"
    assert "may be 1300 or 1.300" in refusal(lambda: read_table(write(tmp_path / "p.csv", text % "1,300")))
    assert read_table(write(tmp_path / "p.csv", text % "1,300,000"))["n_params"].tolist() == [1.3e6]
    for loss in ("3,125", "2,5"):
        path = write(tmp_path / "q.csv", f'{HEADER}\nx,1e5,1e6,"{loss}"\n')
        assert "write decimals with a point" in refusal(lambda path=path: read_table(path))


def test_sizes_in_billions_are_refused_by_their_column_and_read_with_the_unit(cases: Path) -> None:
    said = refusal(lambda: read_table(cases / "billions.csv"))
    assert all(
        text in said for text in ("column n_params", "0.0299939", "0.310606", "billions", "--unit n_params=B")
    )
    assert "ssm" not in said.replace(str(cases), "")
    found = read_table(cases / "billions.csv", units={"n_params": 1e9})[COLUMNS]
    pd.testing.assert_frame_equal(found, read_table(cases / "plain.csv")[COLUMNS], rtol=2e-5)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("n_params", [0.125, 1.3, 7, 70], "billions"),
        ("n_params", [7, 13, 34, 70], "billions"),
        ("n_params", [0.125, 6.7, 175], "billions"),
        ("n_params", [125, 350, 760], "millions"),
        ("n_params", [0.5, 1, 3], "millions"),
        ("n_params", [70, 410, 1400, 12000], "millions"),
        ("tokens", [10, 100, 350], "billions"),
        ("tokens", [500, 2000, 16000], "millions"),
        ("flops", [0.1, 1, 30], "exaFLOPs"),
    ],
)
def test_the_unit_of_a_column_is_told_by_its_values(
    tmp_path: Path, column: str, values: list[float], said: str
) -> None:
    count = len(values)
    table = pd.DataFrame(
        {"architecture": "a", "n_params": 1e8, "tokens": 2e9, "flops": 1.2e18, "loss": 3.0},
        index=range(count),
    )
    if column == "n_params":
        table["tokens"] = 5e7 if values == [0.5, 1, 3] else 1e11
    if column == "tokens" and max(values) < 1000:
        table["n_params"] = np.geomspace(1e9, 1e10, count)
    table[column] = values
    table.to_csv(tmp_path / "p.csv", index=False)
    message = refusal(lambda: read_table(tmp_path / "p.csv"))
    assert f"column {column} has values below a thousand" in message
    assert f"seem to be {said}" in message


def test_one_size_in_another_unit_than_the_rest_is_named_by_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", f"{HEADER}\nx,125000000,1e9,3\nx,350000000,1e9,2.9\nx,1.3,1e9,2.7\n")
    assert "row 4, column n_params: 1.3 is below a thousand" in refusal(lambda: read_table(path))


def test_rows_without_a_result_are_set_aside_each_with_its_reason(cases: Path) -> None:
    points = check_points(read_table(cases / "states.csv"))
    assert [(gone.row, gone.code, gone.reason) for gone in points.exclusions] == [
        (5, "unfinished", "its state is crashed, column loss is empty"),
        (11, "unfinished", "its state is failed, column tokens is 0"),
        (16, "unfinished", "its state is running, column loss is NaN"),
    ]
    document = fit_points(points, resamples=100)
    assert [fit.n_points for fit in document.architectures.values()] == [20, 17]
    told = json.loads(json.dumps(document.model_dump(mode="json"), allow_nan=False))
    assert [(gone["row"], gone["loss"]) for gone in told["exclusions"]] == [
        (5, None),
        (11, 3.74194),
        (16, None),
    ]
    assert "unfinished_points" in {note["code"] for note in told["notes"]}


def test_empty_and_infinite_cells_cost_their_row_alone_and_only_where_the_law_reads_them(
    tmp_path: Path,
) -> None:
    rows = [
        "a,1e5,1e6,3",
        "a,,1e6,3",
        "a,1e5,inf,2.9",
        "a,1e5,0,3.1",
        ",1e5,1e6,3",
        "a,1e5,1e6,NaN",
        "a,2e5,2e6,2",
    ]
    frame = read_table(write(tmp_path / "p.csv", "\n".join([HEADER, *rows])))
    points = check_points(frame)
    assert points.frame["row"].tolist() == [2, 8]
    assert [gone.reason for gone in points.exclusions] == [
        *("column n_params is empty", "column tokens is inf", "column tokens is 0"),
        *("column architecture is empty", "column loss is NaN"),
    ]
    by_size = check_points(frame, law_named("size"))
    assert by_size.frame["row"].tolist() == [2, 4, 5, 8]
    assert [note.code for note in by_size.notes] == ["no_tokens"]


def test_a_column_of_states_is_told_by_its_values(tmp_path: Path) -> None:
    text = "architecture,n_params,tokens,loss,%s\na,1e5,1e6,3,%s\na,2e5,1e6,2,%s\n"
    for name, first, second, kept in (
        ("Status", "COMPLETED", "TIMEOUT", 1),
        ("state", "finished", "preempted", 1),
        ("state", "Texas", "Ohio", 2),
        ("status", "ok", "ok", 2),
    ):
        path = write(tmp_path / "p.csv", text % (name, first, second))
        assert len(check_points(read_table(path)).frame) == kept
    mapped = read_table(write(tmp_path / "p.csv", text % ("phase", "done", "half")), {"state": "phase"})
    assert [gone.reason for gone in check_points(mapped).exclusions] == ["its state is half"]


def test_a_table_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", f"{HEADER},state\na,1e5,1e6,3,crashed\na,2e5,1e6,,\na,3e5,1e6,,\n")
    said = refusal(lambda: check_points(read_table(path)))
    assert "all 3 rows were set aside" in said
    assert f"{path}: row 3 and 1 more: column loss is empty; row 2: its state is crashed" in said


def test_tokens_follow_from_flops_by_a_named_convention_on_request(cases: Path) -> None:
    said = refusal(lambda: read_table(cases / "no_tokens.csv"))
    assert "column tokens is missing" in said
    assert "--tokens-from flops/6n" in said
    frame = read_table(cases / "no_tokens.csv", tokens_from="flops/6n")
    expected = read_table(cases / "plain.csv")["tokens"]
    np.testing.assert_allclose(frame["tokens"], expected, rtol=1e-5)
    notes = {note.code: note.text for note in fit_points(check_points(frame), resamples=100).notes}
    assert "flops / (6 n_params)" in notes["tokens_from_flops"]
    assert "leave out --tokens-from" in refusal(
        lambda: read_table(cases / "plain.csv", tokens_from="flops/6n")
    )
    assert "choose flops/6n" in refusal(lambda: read_table(cases / "plain.csv", tokens_from="chinchilla"))


@pytest.mark.parametrize(
    ("law", "missing"), [("size", "tokens"), ("data", "n_params"), ("learning_curve", "n_params")]
)
def test_a_law_asks_only_for_the_columns_it_reads(tmp_path: Path, law: str, missing: str) -> None:
    table = SyntheticStudy().table(0)
    table = table[(table["n_params"] == 1e5) if law != "size" else (table["iterations"] == 1600)]
    drop = ["tokens", "iterations", "flops", "cluster"] if law == "size" else ["n_params", "flops", "cluster"]
    table.drop(columns=drop).to_csv(tmp_path / "p.csv", index=False)
    assert f"column {missing} is missing" in refusal(lambda: read_table(tmp_path / "p.csv"))
    points = check_points(read_table(tmp_path / "p.csv", law=law_named(law)), law_named(law))
    document = fit_points(points, law=law, resamples=100)
    assert all(np.isfinite(list(fit.params.values())).all() for fit in document.architectures.values())
    assert f"no_{missing}" in {note.code for note in document.notes}
    json.dumps(document.model_dump(mode="json"), allow_nan=False)


def test_runs_that_differ_in_flops_alone_are_no_seeds_of_a_law_of_size(cases: Path) -> None:
    law = law_named("size")
    points = check_points(read_table(cases / "no_tokens.csv", law=law), law)
    assert len(points.frame) == 40
    alone = points.frame.assign(cluster=points.frame["row"].astype(str))
    assert not seed_noise(alone[alone["architecture"] == "ssm"])
    assert fit_points(points, law="size", resamples=100).architectures["ssm"].n_points == 40 / 2


def test_a_law_of_iterations_counts_an_iteration_as_a_token_where_there_are_none(tmp_path: Path) -> None:
    table, law = SyntheticStudy().table(0), "chinchilla_iterations"
    table.drop(columns="tokens").to_csv(tmp_path / "p.csv", index=False)
    frame = read_table(tmp_path / "p.csv", law=law_named(law))
    found = fit_points(check_points(frame, law_named(law)), law=law, resamples=100).comparison
    whole = fit_points(checked(table), law=law, resamples=100).comparison
    for mine, other in ((found.size_ratio, whole.size_ratio), (found.token_gain, whole.token_gain)):
        assert [row.estimate for row in mine] == pytest.approx([row.estimate for row in other])


def test_several_files_are_one_table_whose_messages_name_the_file(tmp_path: Path) -> None:
    first = write(tmp_path / "transformer.csv", "n_params,tokens,loss\n1e5,1e6,3\n2e5,1e6,2.9\n")
    second = write(tmp_path / "ssm.v2.csv", "params,tokens,loss\n1e5,1e6,2.8\n2e5,1e6,\n")
    columns = {"architecture": "@file", "n_params": "params"}
    frame = read_table([first, second], columns)
    assert frame["architecture"].tolist() == ["transformer"] * 2 + ["ssm"] * 2
    assert frame["run_id"].nunique() == 4
    (gone,) = check_points(frame).exclusions
    assert (gone.file, gone.row, gone.reason) == (str(second), 3, "column loss is empty")
    write(second, "params,tokens,loss\n1e5,1e6,low\n")
    assert f"{second}: row 2, column loss: 'low'" in refusal(lambda: read_table([first, second], columns))
    write(second, "size,tokens,loss\n1e5,1e6,3\n")
    assert f"{second}: no column 'params'" in refusal(lambda: read_table([first, second], columns))


def test_a_run_with_two_losses_in_two_files_is_refused_and_with_one_loss_counted_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", f"{HEADER},run_id\nx,1e5,1e6,3,r\nx,2e5,1e6,2.9,s\n")
    second = write(tmp_path / "b.csv", f"{HEADER},run_id\nx,1e5,1e6,3.5,r\n")
    said = refusal(lambda: read_table([first, second]))
    assert f"{second}: row 2, column loss: run r at 1000000 tokens has 3.0 in row 2 of {first}" in said
    again = check_points(read_table([first, write(second, f"{HEADER},run_id\nx,1e5,1e6,3,r\n")]))
    assert [(gone.file, gone.code) for gone in again.exclusions] == [(str(second), "duplicate")]


def test_dropped_outliers_of_several_files_are_rows_of_their_own_file(tmp_path: Path) -> None:
    from analysis.findings.document import drop_outliers

    table = SyntheticStudy(cluster_noise=1e-4, row_noise=1e-4).table(0)
    one, other = (
        table[table["architecture"] == name].copy() for name in ("cross_transformer", "prefix_simba")
    )
    other.iloc[4, other.columns.get_loc("loss")] *= 2
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path, part in zip(paths, (one, other), strict=True):
        part.to_csv(path, index=False)
    found = drop_outliers(check_points(read_table(paths)))
    assert [(gone.file, gone.row) for gone in found.exclusions] == [(str(paths[1]), 6)]
