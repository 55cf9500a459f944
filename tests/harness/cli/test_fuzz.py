"""Damaged input: studies and tables, changed value by value and cut byte by byte.

Each case ends with a clear refusal, or with the answer of a small model in the test. The command executes nothing from
it and writes nothing but its output.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from harness.common.validation import read_yaml
from tests.conftest import Command, tiny_study
from tests.harness.fuzzing import (
    Case,
    Planted,
    damaged,
    hashes,
    mutations,
    places,
    refusal_of,
    refused,
    repeat,
    strictly,
)

# -- studies

WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)


@st.composite
def studies(draw: st.DrawFn, corpus: str) -> dict[str, Any]:
    """A study that is right."""
    iterations = sorted(draw(st.sets(st.integers(5, 5000), min_size=1, max_size=4)))
    widths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True))
    names = draw(st.lists(WORDS, min_size=len(widths), max_size=len(widths), unique=True))
    seeds = st.lists(st.integers(0, 2**40), min_size=1, max_size=3, unique=True)
    architectures = ["prefix_mamba", "prefix_simba", "cross_simba", "cross_transformer"]
    chosen = draw(st.lists(st.sampled_from(architectures), min_size=1, max_size=4, unique=True))
    fields: dict[str, Any] = {
        "name": draw(WORDS),
        "corpus": {"path": corpus},
        "text": {"dim": draw(st.integers(1, 64)), "max_positions": draw(st.integers(1, 64))},
        "model": {"d_state": draw(st.integers(1, 64)), "ssm_head_dim": 8, "head_dim": 8, "dropout": 0.1},
        "grid": {
            "architectures": {
                name: draw(st.sampled_from([None, {"model": {"ff_mult": 4}}])) for name in chosen
            },
            "sizes": {
                name: {"n_blocks": draw(st.integers(1, 6)), "d_model": 8 * width}
                for name, width in zip(names, widths, strict=True)
            },
            "iterations": iterations,
            "seeds": draw(seeds),
            "replicates": draw(st.sampled_from([[], [{"sizes": [names[0]], "seeds": draw(seeds)}]])),
        },
        "training": {
            "batch": draw(st.integers(1, 64)),
            "optimiser": {"lr": draw(st.floats(1e-6, 1.0))},
            "schedule": {"kind": draw(st.sampled_from(["wsd", "cosine", "constant"])), "warmup": 2},
        },
        "tracking": {"log_every": draw(st.integers(1, 100))},
        "resources": {"keep_last": draw(st.integers(1, 5)), "keep_best": draw(st.booleans())},
    }
    return fields


@st.composite
def study_cases(draw: st.DrawFn, kind: str, corpus: str, planted: Planted) -> Case:
    fields = draw(studies(corpus))
    if kind == "mutated":
        fields = draw(mutations(fields))
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=draw(st.booleans()))
    if kind == "broken":
        if draw(st.booleans()):
            line = draw(st.integers(0, text.count("\n") - 1))
            lines = text.split("\n")
            lines[line] = lines[line].partition(":")[0] + ": " + planted.tag
            text = "\n".join(lines)
        else:
            return Case(kind, draw(damaged(text.encode())))
    return Case(kind, text.encode())


def runs_of(fields: dict[str, Any]) -> int:
    """Number of runs of the grid."""
    grid = fields["grid"]
    seeds = {name: set(grid.get("seeds", [0])) for name in grid["sizes"]}
    for more in grid.get("replicates") or ():
        for name in more["sizes"]:
            seeds[name] |= set(more["seeds"])
    return len(grid["architectures"]) * len(grid["iterations"]) * sum(map(len, seeds.values()))


def test_a_study_is_planned_whole_or_refused_with_a_sentence(
    times: int, ssmscale: Command, tmp_path: Path, tiny_corpus: Path, planted: Planted
) -> None:
    path = tmp_path / "study.yaml"

    def check(case: Case) -> None:
        path.write_bytes(case.content)
        before = hashes(tmp_path)
        answer = ssmscale("plan", path, "--json")
        planted.assert_not_executed()
        assert hashes(tmp_path) == before
        if refused(answer, path.name):
            assert case.kind != "valid", answer.err
            return
        plan = strictly(answer.out)
        assert len(plan["runs"]) == runs_of(read_yaml(path))
        ids = [run["run_id"] for run in plan["runs"] if run["run_id"] is not None]
        assert len(set(ids)) == len(ids)

    repeat(60 * times, lambda kind: study_cases(kind, str(tiny_corpus), planted), check)


EXTREMES: dict[type, list[Any]] = {
    int: [0, 10**400, -1, 3, 2**31 - 1, 2**63],
    float: [math.nan, 1.7e308, 0.0, 5e-324, math.inf],
    str: ["a/" * 3000, "\0", "", "a" * 300, "[/]"],
}


@pytest.mark.parametrize(
    ("known", "most"),
    [
        (True, 2),
        pytest.param(True, None, marks=pytest.mark.verify),
        pytest.param(False, None, marks=pytest.mark.verify),
    ],
)
def test_no_value_of_a_study_is_too_small_too_large_or_too_long_for_a_sentence(
    known: bool, most: int | None, ssmscale: Command, tmp_path: Path, tiny_corpus: Path
) -> None:
    facts = {"n_codebooks": 2, "codebook_size": 64, "frames": 50, "clips": 48}
    fields = tiny_study(tiny_corpus) | {"root": "runs"}
    fields["corpus"] = {"path": str(tiny_corpus) if known else "elsewhere", "facts": facts}
    fields["text"] |= {"patch": 8, "encoder": "bytes"}
    fields["model"] |= {"d_conv": 4, "expand": 2, "n_groups": 1, "ff_mult": 2}
    fields["grid"] |= {"seeds": [0], "replicates": [{"sizes": ["xs"], "seeds": [1]}]}
    fields["training"]["optimiser"] |= {"beta1": 0.9, "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0}
    fields["training"]["schedule"] |= {"kind": "wsd", "decay_fraction": 0.2, "final_fraction": 0.1}
    fields["tracking"] |= {"eval_every": 5, "uri": "sqlite:////tmp/x.db"}
    fields["resources"] = {"ranks": 1, "zero_stage": 0, "threads": 1, "jobs": 1, "checkpoint_every": 9}
    fields["resources"] |= {"peak_flops": 1e12, "keep_last": 1}
    path = tmp_path / "study.yaml"
    for number, (place, name) in enumerate(places(fields)):
        for extreme in EXTREMES.get(type(place[name]), [])[:most]:
            changed = copy.deepcopy(fields)
            holder, key = list(places(changed))[number]
            holder[key] = extreme
            path.write_text(yaml.safe_dump(changed))
            answer = ssmscale("plan", path, "--json")
            assert refused(answer, path.name) or strictly(answer.out)["runs"], (key, extreme)


# -- tables of points

NUMBERS = {
    "n_params": st.floats(1e3, 1e12),
    "tokens": st.floats(1e3, 1e14),
    "loss": st.floats(0.5, 10.0),
    "iterations": st.integers(1, 10**6),
    "flops": st.floats(1e6, 1e24),
    "seed": st.integers(0, 5),
    "annealed": st.sampled_from(["true", "False", "1", "no", "YES"]),
    "cluster": st.sampled_from(["c1", "c2", "c3"]),
}


@st.composite
def tables(draw: st.DrawFn, most: int = 12) -> list[dict[str, Any]]:
    """Rows that are right; run ids, where there are any, are never used twice."""
    columns = [name for name in NUMBERS if name in {"n_params", "tokens", "loss"} or draw(st.booleans())]
    names = draw(st.lists(WORDS, min_size=1, max_size=3, unique=True))
    rows = []
    for number in range(draw(st.integers(1, most))):
        row: dict[str, Any] = {"architecture": draw(st.sampled_from(names))}
        row |= {name: draw(NUMBERS[name]) for name in columns}
        if "seed" in columns:
            row["run_id"] = f"run-{number}"
        rows.append(row)
    return rows + [rows[-1]] * draw(st.integers(0, 2))


def as_csv(rows: list[dict[str, Any]], separator: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


@st.composite
def table_cases(draw: st.DrawFn, kind: str, planted: Planted, most: int = 12) -> Case:
    rows = draw(tables(most))
    if kind == "mutated":
        row = draw(st.integers(0, len(rows) - 1))
        rows[row] = draw(mutations(rows[row], 2))
    content = as_csv(rows, draw(st.sampled_from([",", ";", "\t"])) if kind == "valid" else ",")
    if kind == "broken":
        content = draw(st.one_of(damaged(content), st.just(planted.pickled)))
    return Case(kind, (content, rows))


def as_read(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `annealed` as a truth value, however it is spelled."""
    return row | {"annealed": str(row.get("annealed", "true")).lower() in {"true", "1", "yes"}}


def test_every_row_of_a_table_is_taken_or_set_aside_or_the_table_is_refused(
    times: int, tmp_path: Path, planted: Planted
) -> None:
    from analysis.errors import InputError
    from analysis.points.table import check_points, read_table

    path = tmp_path / "points.csv"

    def check(case: Case) -> None:
        content, rows = case.content
        path.write_bytes(content)
        before = hashes(tmp_path)
        frames: list[Any] = []
        said = refusal_of(lambda: frames.append(read_table(path)), InputError)
        planted.assert_not_executed()
        assert hashes(tmp_path) == before
        if said is not None:
            assert case.kind != "valid", said
            assert path.name in said
            return
        (frame,) = frames
        checks: list[Any] = []
        said = refusal_of(lambda: checks.append(check_points(frame)), InputError)
        if said is not None:
            assert "no point is left" in said
            return
        (checked,) = checks
        for name in ("n_params", "tokens", "loss"):
            assert all(math.isfinite(value) and value > 0 for value in checked.frame[name])
        assert len(checked.frame) + len(checked.exclusions) == len(frame)
        if case.kind == "valid":
            assert len(frame) == len(rows)
            annealed = {False: 0, True: 0}
            for row in {tuple(sorted(as_read(row).items())): as_read(row) for row in rows}.values():
                annealed[row["annealed"]] += 1
            twice = len(rows) - sum(annealed.values())
            assert [e.code for e in checked.exclusions].count("duplicate") == twice
            assert [e.code for e in checked.exclusions].count("unannealed") == annealed[False]

    repeat(40 * times, lambda kind: table_cases(kind, planted), check)


def test_a_fit_is_finite_or_says_what_is_wrong_with_it(times: int, tmp_path: Path, planted: Planted) -> None:
    from analysis.errors import InputError
    from analysis.findings.document import fit_points
    from analysis.points.table import check_points, read_table

    path = tmp_path / "points.csv"

    def check(case: Case) -> None:
        content, _ = case.content
        path.write_bytes(content)
        documents: list[Any] = []
        said = refusal_of(
            lambda: documents.append(fit_points(check_points(read_table(path)), resamples=100)), InputError
        )
        planted.assert_not_executed()
        if said is not None:
            return
        (document,) = documents
        told = json.loads(json.dumps(document.model_dump(mode="json"), allow_nan=False))
        for name, fit in told["architectures"].items():
            finite = all(value is not None for value in (*fit["params"].values(), fit["objective"]))
            assert finite or fit["notes"], name

    repeat(10 * times, lambda kind: table_cases(kind, planted, most=8), check)
