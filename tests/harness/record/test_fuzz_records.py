"""Changed and torn journals, control files and JSON files of ROOT.

Valid lines must give the answer that a small model gives. Everything else is skipped or refused with a sentence;
nothing in it is executed, and only the expected output is written.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from harness.record.registry import ResolvedStudy
from harness.record.root import read_launch
from harness.train.worker import group_by_series
from ssmttm.errors import InputError
from tests.conftest import Command
from tests.harness.fuzzing import (
    Case,
    Planted,
    damaged,
    dumped,
    hashes,
    mutations,
    refusal_of,
    refused,
    repeat,
    strictly,
)
from tests.harness.journals import ELSEWHERE, finish_all, lines_of, measured_at, result_of, written

# -- journals

NOT_OURS = st.sampled_from(
    [b"\xff\xfe", b"{}", b"null", b"[1, 2]", b"", b'{"t": 1}', b'{"t": 1, "event": 5}', b"\0" * 40]
)
TORN = st.sampled_from([b"", b'{"t": 1.0, "event": "fin', b"{", b"\xff"])


@st.composite
def histories(draw: st.DrawFn, finished: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Draw the events of each attempt on a run of 10 iterations that branches at 8."""
    attempts, loss = [], st.floats(0.1, 9.0)
    for number in range(draw(st.integers(0, 3))):
        events: list[dict[str, Any]] = [{"t": 1.0 + number, "event": "started", "step": 8, **ELSEWHERE}]
        events += [
            {"t": 2.0, "event": "step", **measured_at(step), "loss": draw(loss)}
            for step in range(9, 9 + draw(st.integers(0, 2)))
        ]
        ends = {
            "finished": finished | {"loss": draw(loss)},
            "failed": {"reason": draw(st.text(max_size=8)), "kind": "error"},
            "preempted": {"reason": "SIGTERM"},
        }
        end = draw(st.sampled_from([*ends, "nothing", "nothing"]))
        attempts.append([*events, {"t": 3.0, "event": end, **ends[end]}] if end in ends else events)
    return attempts


@st.composite
def journal_cases(draw: st.DrawFn, kind: str, finished: dict[str, Any], planted: Planted) -> Case:
    attempts = draw(histories(finished))
    if kind == "mutated":
        attempts = draw(mutations(attempts))
        return Case(kind, ([lines_of(events) for events in attempts if isinstance(events, list)], None))
    contents = []
    for events in attempts:
        lines = lines_of(events).splitlines(keepends=True)
        for _ in range(draw(st.integers(0, 3))):
            lines.insert(draw(st.integers(0, len(lines))), draw(NOT_OURS) + b"\n")
        contents.append(b"".join(lines) + draw(TORN))
    if kind == "broken":
        contents = [draw(st.one_of(damaged(content), st.just(planted.pickled))) for content in contents]
    return Case(kind, (contents, attempts))


def model_of(attempts: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the fields that `status` should print of the run."""
    events = [event for attempt in attempts for event in attempt]
    steps = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    row: dict[str, Any] = {
        "state": "interrupted" if events else "new",
        "loss": None,
        "reason": None,
        "iterations_done": [e["step"] for e in events if "step" in e][-1] if events else 0,
        "train_loss": steps[max(steps)] if steps else None,
    }
    last = next((event for event in reversed(events) if event["event"] != "step"), {"event": "none"})
    changes = {
        "finished": {"state": "done", "loss": last.get("loss"), "iterations_done": 10},
        "failed": {"state": "failed", "reason": last.get("reason")},
        "preempted": {"reason": last.get("reason")},
    }
    return row | changes.get(last["event"], {})


def test_status_follows_the_valid_lines_of_a_journal(
    times: int, resolved: ResolvedStudy, ssmscale: Command, tmp_path: Path, planted: Planted
) -> None:
    finished, run_id = result_of(resolved, 1, 3.0), resolved.points[1].run.run_id

    def check(case: Case) -> None:
        contents, attempts = case.content
        written(resolved.root, run_id, contents)
        before = hashes(tmp_path)
        answer = ssmscale("status", "tiny", "--json")
        planted.assert_not_executed()
        assert hashes(tmp_path) == before
        assert not refused(answer)  # damaged lines are skipped, but a journal is never refused
        row = strictly(answer.out)["runs"][1]
        if case.kind != "valid":
            return
        expected = model_of(attempts)
        assert {name: row[name] for name in expected} == expected
        if expected["state"] == "done":
            assert ssmscale("export", "tiny", "--out", "tiny.zip").status == 0
            with zipfile.ZipFile("tiny.zip") as archive:
                header, row = archive.read("points.csv").decode().splitlines()
            assert dict(zip(header.split(","), row.split(","), strict=True))["loss"] == repr(expected["loss"])
            Path("tiny.zip").unlink()

    repeat(30 * times, lambda kind: journal_cases(kind, finished, planted), check)


# -- control.jsonl


@st.composite
def control_cases(draw: st.DrawFn, kind: str, runs: list[str]) -> Case:
    some = st.lists(st.sampled_from(runs), max_size=3)
    kinds = st.sampled_from(["cancelled", "retried", "submitted", "pruned"])
    events = [{"t": 1.0, "event": draw(kinds), "runs": draw(some)} for _ in range(draw(st.integers(0, 6)))]
    for event in events:
        if event["event"] == "submitted":
            event["process"] = ELSEWHERE
        if event["event"] == "retried":
            event["attempts"] = dict.fromkeys(event["runs"], 0)
    content = lines_of(draw(mutations(events)) if kind == "mutated" else events)
    if kind == "broken":
        content = draw(damaged(content))
    elif kind == "valid":
        content += draw(TORN)
    return Case(kind, (content, events))


def test_status_follows_the_valid_lines_of_a_control_file(
    times: int, resolved: ResolvedStudy, ssmscale: Command, tmp_path: Path
) -> None:
    runs = [point.run.run_id for point in resolved.points]
    path = resolved.root.study("tiny") / "control.jsonl"

    def check(case: Case) -> None:
        content, events = case.content
        path.write_bytes(content)
        before = hashes(tmp_path)
        answer = ssmscale("status", "tiny", "--json")
        assert hashes(tmp_path) == before
        assert not refused(answer)
        if case.kind == "valid":
            cancelled: set[str] = set()
            for event in events:
                if event["event"] == "cancelled":
                    cancelled.update(event["runs"])
                elif event["event"] == "retried":
                    cancelled.difference_update(event["runs"])
            states = {run["run_id"]: run["state"] for run in strictly(answer.out)["runs"]}
            assert states == {run: "cancelled" if run in cancelled else "new" for run in runs}

    repeat(12 * times, lambda kind: control_cases(kind, runs), check)


# -- study.json, run.json, series.json, launch.json, calibration.json


@st.composite
def file_cases(draw: st.DrawFn, kind: str, files: dict[Path, Any], planted: Planted) -> Case:
    path = draw(st.sampled_from(list(files)))
    if kind == "valid":
        document = {key: files[path][key] for key in draw(st.permutations(sorted(files[path])))}
        text = json.dumps(document, indent=draw(st.sampled_from([None, 1, 4])))
        return Case(kind, (path, (text + draw(st.text(" \t\r\n", max_size=9))).encode()))
    if kind == "mutated":
        return Case(kind, (path, dumped(draw(mutations(files[path])))))
    torn = st.one_of(damaged(dumped(files[path])), st.just(planted.pickled), st.just(b"[" * 100_000))
    return Case(kind, (path, draw(torn)))


def test_the_json_files_of_root_are_read_correctly_or_refused_by_name(
    times: int, resolved: ResolvedStudy, ssmscale: Command, tmp_path: Path, planted: Planted
) -> None:
    finish_all(resolved)
    root, run = resolved.root, resolved.points[0].run
    launch = {"corpus": "c", "control": "c.jsonl", "dispatcher": "local", "micro_batch": 4}
    (root.series(run.series_id) / "launch.json").write_bytes(dumped(launch))
    calibrated = {"flops_per_second": {"prefix_simba/xs": 1e9}}
    (root.study("tiny") / "calibration.json").write_bytes(dumped(calibrated))
    paths = [
        *(root.study("tiny") / name for name in ("study.json", "calibration.json")),
        root.run(run.run_id) / "run.json",
        *(root.series(run.series_id) / name for name in ("series.json", "launch.json")),
    ]
    files = {path: json.loads(path.read_bytes()) for path in paths}
    bundle = tmp_path / "out.zip"

    def check(case: Case) -> None:
        path, content = case.content
        path.write_bytes(content)
        before = hashes(tmp_path)
        try:
            for verb, *options in (("status",), ("plan",), ("prune", "--dry-run")):
                answer = ssmscale(verb, "tiny", *options, "--json")
                if refused(answer, path.name):
                    assert case.kind != "valid", answer.err
                else:
                    assert strictly(answer.out)
            # A study changed into another valid one may have nothing to export, and the error then names no file.
            answer = ssmscale("export", "tiny", "--out", bundle)
            assert not refused(answer, "tiny") or case.kind != "valid", answer.err
            bundle.unlink(missing_ok=True)
            for read in (
                lambda: read_launch(root, run.series_id),
                lambda: group_by_series([root.run(run.run_id)]),
            ):
                said = refusal_of(read, InputError)
                assert said is None or (case.kind != "valid" and path.name in said)
        finally:
            planted.assert_not_executed()
            assert hashes(tmp_path) == before
            path.write_bytes(dumped(files[path]))

    repeat(24 * times, lambda kind: file_cases(kind, files, planted), check)
