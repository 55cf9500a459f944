"""Records nobody meant: journals, control files, the JSON of ROOT, checkpoints and bundles, changed and torn.

What is whole among them must still give the right answer, which a small model of its own says; everything else is
passed over or refused with a sentence, nothing in it is executed, and nothing but the expected output is written.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from harness.bundle import count_members
from harness.journal import Event, read_progress
from harness.rundir import Root, read_launch, read_run, write_run, write_series
from harness.study import Study
from harness.submission import ResolvedStudy, register, resolve
from harness.training import checkpoint as checkpoints
from harness.training.result import describe_result
from harness.validation import validate
from harness.worker import group_by_series
from ssmttm.errors import InputError
from tests.conftest import Answer
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

Command = Callable[..., Answer]
ELSEWHERE = {"host": "elsewhere", "pid": 7, "process_started": 1.0, "job_id": "7"}


@pytest.fixture
def resolved(tmp_path: Path, study_fields: dict[str, Any]) -> ResolvedStudy:
    """A registered study of two runs that nobody has trained, under ./runs."""
    root = Root(tmp_path / "runs")
    found = resolve(validate(Study, study_fields, "test"), root, "test")
    register(found)
    for point in found.points:
        write_run(root, point.run)
        write_series(root, point.run)
    return found


def result_of(resolved: ResolvedStudy, number: int, loss: float) -> dict[str, Any]:
    run = resolved.points[number].run
    measured = {"loss": loss, "loss_codebooks": [loss, loss], "step": run.iterations, "tokens": 100}
    return {**measured, **describe_result(run, 100, 1e6)}


def written(root: Root, run_id: str, attempts: list[bytes]) -> None:
    """The journal of a Run, and no other attempts than these."""
    folder = root.run(run_id) / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, content in enumerate(attempts, 1):
        (folder / f"{number:04d}.jsonl").write_bytes(content)


def finish_all(resolved: ResolvedStudy) -> None:
    for number, point in enumerate(resolved.points):
        events = [
            {"t": 1.0 + number, "event": "started", "step": 4, **ELSEWHERE},
            {"t": 2.0, "event": "finished", **result_of(resolved, number, 3.0)},
        ]
        written(resolved.root, point.run.run_id, [lines_of(events)])


def lines_of(events: list[Any]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


# -- journals

NOT_OURS = st.sampled_from(
    [
        b"\xff\xfe\n",
        b"{}\n",
        b"null\n",
        b"[1, 2]\n",
        b"\n",
        b'{"t": 1}\n',
        b'{"t": 1, "event": 5}\n',
        b"\0" * 40 + b"\n",
    ]
)
TORN = st.sampled_from([b"", b'{"t": 1.0, "event": "fin', b"{", b"\xff"])


@st.composite
def histories(draw: st.DrawFn, finished: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What happened to a run of 10 iterations that leaves the trunk at 8: the events of each attempt."""
    attempts, loss = [], st.floats(0.1, 9.0)
    for number in range(draw(st.integers(0, 3))):
        events: list[dict[str, Any]] = [{"t": 1.0 + number, "event": "started", "step": 8, **ELSEWHERE}]
        events += [
            {
                "t": 2.0,
                "event": "step",
                "step": step,
                "loss": draw(loss),
                "lr": 1e-3,
                "tokens": step,
                "tokens_per_second": 1.0,
            }
            for step in range(9, 9 + draw(st.integers(0, 2)))
        ]
        end = draw(st.sampled_from(["finished", "failed", "preempted", "nothing", "nothing"]))
        if end == "finished":
            events.append({"t": 3.0, "event": "finished", **finished, "loss": draw(loss)})
        elif end == "failed":
            events.append({"t": 3.0, "event": "failed", "reason": draw(st.text(max_size=8)), "kind": "error"})
        elif end == "preempted":
            events.append({"t": 3.0, "event": "preempted", "reason": "SIGTERM"})
        attempts.append(events)
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
            lines.insert(draw(st.integers(0, len(lines))), draw(NOT_OURS))
        contents.append(b"".join(lines) + draw(TORN))
    if kind == "broken":
        contents = [draw(st.one_of(damaged(content), st.just(planted.pickled))) for content in contents]
    return Case(kind, (contents, attempts))


def model_of(attempts: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """What `status` should say of the run of 10 iterations, in as few words as there are."""
    events = [event for attempt in attempts for event in attempt]
    ends = [event for event in events if event["event"] not in {"step"}]
    last = ends[-1] if ends else None
    steps = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    told: dict[str, Any] = {"state": "interrupted" if events else "new", "loss": None, "reason": None}
    told["iterations_done"] = [e["step"] for e in events if "step" in e][-1] if events else 0
    told["train_loss"] = steps[max(steps)] if steps else None
    if last is not None and last["event"] == "finished":
        told |= {"state": "done", "loss": last["loss"], "iterations_done": 10}
    elif last is not None and last["event"] == "failed":
        told |= {"state": "failed", "reason": last["reason"]}
    return told


def test_a_journal_says_what_its_good_lines_say(
    times: int,
    resolved: ResolvedStudy,
    ssmscale: Command,
    tmp_path: Path,
    planted: Planted,
) -> None:
    finished, run_id = result_of(resolved, 1, 3.0), resolved.points[1].run.run_id

    def check(case: Case) -> None:
        contents, attempts = case.content
        written(resolved.root, run_id, contents)
        before = hashes(tmp_path)
        answer = ssmscale("status", "tiny", "--json")
        planted.assert_not_executed()
        assert hashes(tmp_path) == before
        assert not refused(answer)  # a journal is never wrong input: what is damaged in it is passed over
        told = strictly(answer.out)["runs"][1]
        if case.kind != "valid":
            return
        expected = model_of(attempts)
        assert {name: told[name] for name in expected} == expected
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
    events = [
        {
            "t": 1.0,
            "event": draw(st.sampled_from(["cancelled", "retried", "submitted", "pruned"])),
            "runs": draw(some),
        }
        for _ in range(draw(st.integers(0, 6)))
    ]
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


def test_a_control_file_says_what_its_good_lines_say(
    times: int,
    resolved: ResolvedStudy,
    ssmscale: Command,
    tmp_path: Path,
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
            told = {run["run_id"]: run["state"] for run in strictly(answer.out)["runs"]}
            assert told == {run: "cancelled" if run in cancelled else "new" for run in runs}

    repeat(12 * times, lambda kind: control_cases(kind, runs), check)


# -- study.json, run.json, series.json, launch.json, calibration.json


@st.composite
def file_cases(draw: st.DrawFn, kind: str, files: dict[Path, Any], planted: Planted) -> Case:
    path = draw(st.sampled_from(list(files)))
    if kind == "valid":
        document = {key: files[path][key] for key in draw(st.permutations(sorted(files[path])))}
        text = json.dumps(document, indent=draw(st.sampled_from([None, 1, 4]))) + draw(
            st.text(" \t\r\n", max_size=9)
        )
        return Case(kind, (path, text.encode()))
    if kind == "mutated":
        return Case(kind, (path, dumped(draw(mutations(files[path])))))
    torn = st.one_of(damaged(dumped(files[path])), st.just(planted.pickled), st.just(b"[" * 100_000))
    return Case(kind, (path, draw(torn)))


def test_the_json_of_root_is_read_right_or_refused_by_name(
    times: int,
    resolved: ResolvedStudy,
    ssmscale: Command,
    tmp_path: Path,
    planted: Planted,
) -> None:
    finish_all(resolved)
    root, run = resolved.root, resolved.points[0].run
    launch = {"corpus": "c", "control": "c.jsonl", "dispatcher": "local", "micro_batch": 4}
    (root.series(run.series_id) / "launch.json").write_bytes(dumped(launch))
    (root.study("tiny") / "calibration.json").write_bytes(
        dumped({"flops_per_second": {"prefix_simba/xs": 1e9}})
    )
    paths = [
        root.study("tiny") / "study.json",
        root.study("tiny") / "calibration.json",
        root.run(run.run_id) / "run.json",
        root.series(run.series_id) / "series.json",
        root.series(run.series_id) / "launch.json",
    ]
    files = {path: json.loads(path.read_bytes()) for path in paths}
    bundle = tmp_path / "out.zip"

    def check(case: Case) -> None:
        path, content = case.content
        path.write_bytes(content)
        before = hashes(tmp_path)
        try:
            for verb in (
                ["status", "--json"],
                ["plan", "--json"],
                ["prune", "--dry-run", "--json"],
                ["export", "--out", bundle],
            ):
                answer = ssmscale(verb[0], "tiny", *verb[1:])
                # a study changed into another that is right may have nothing to export, which is no fault of the file
                if not refused(answer, "tiny" if verb[0] == "export" else path.name):
                    assert verb[0] == "export" or strictly(answer.out)
                else:
                    assert case.kind != "valid", answer.err
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


# -- checkpoints


@st.composite
def checkpoint_cases(
    draw: st.DrawFn, kind: str, marker: dict[str, Any], content: bytes, planted: Planted
) -> Case:
    if kind == "valid":
        told = {"tokens": draw(st.integers(0, 2**62)), "branch": draw(st.booleans())}
        return Case(kind, (dumped(marker | told), content))
    if kind == "mutated":
        changed = draw(mutations(marker))
        files = changed.get("files") if isinstance(changed, dict) else None
        if isinstance(files, dict) and files and draw(st.booleans()):
            stray = draw(st.sampled_from(["../secret", "/etc/passwd", "../../../study.json", ".", "", "\0"]))
            files[stray] = next(iter(files.values()))
        return Case(kind, (dumped(changed), content))
    spoilt = draw(st.one_of(damaged(content), st.just(planted.pickled)))
    facts = {"bytes": len(spoilt), "sha256": hashlib.sha256(spoilt).hexdigest()}
    return Case(kind, (dumped(marker | {"files": {"a.pt": facts}}), spoilt))


def test_a_checkpoint_is_good_or_has_a_problem_and_pruning_touches_nothing_else(
    times: int,
    resolved: ResolvedStudy,
    ssmscale: Command,
    tmp_path: Path,
    planted: Planted,
) -> None:
    import torch

    box = io.BytesIO()
    torch.save({"module": {"w": torch.zeros(3)}, "step": 8}, box)
    content = box.getvalue()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    marker = {"step": 8, "tokens": 1, "ranks": 1, "zero_stage": 0, "branch": True, "files": {"a.pt": facts}}
    folder = resolved.root.series(resolved.points[0].run.series_id) / "checkpoints"
    (folder / "step-000000008").mkdir(parents=True)
    (tmp_path / "secret").write_text("kept")

    def check(case: Case) -> None:
        mark, file = case.content
        (folder / "step-000000008").mkdir(exist_ok=True)
        (folder / "step-000000008" / "a.pt").write_bytes(file)
        (folder / "step-000000008.complete").write_bytes(mark)
        problems = [checkpoints.problem_with(held) for held in checkpoints.marked(folder)]
        if case.kind == "valid":
            assert problems == [None]
        before = hashes(tmp_path)
        told = ssmscale("prune", "tiny", "--json")
        planted.assert_not_executed()
        assert not refused(told)
        after = hashes(tmp_path)
        gone = {name for name in before if name not in after}
        assert all("checkpoints/step-000000008" in name for name in gone)
        assert not gone or case.kind != "valid"
        assert all(before[name] == after[name] for name in after if name in before and "control" not in name)
        if strictly(told.out)["removed"]:
            assert gone

    repeat(12 * times, lambda kind: checkpoint_cases(kind, marker, content, planted), check)


# -- bundles


def zipped(members: dict[str, bytes]) -> bytes:
    """A bundle of these members, its list of contents brought up to date where there is one to be read."""
    facts = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in members.items()
        if name != "bundle.json"
    }
    contents = json.loads(members["bundle.json"])
    if isinstance(contents, dict) and "members" in contents:
        contents |= {"members": facts, "counts": count_members(facts).model_dump()}
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, dumped(contents) if name == "bundle.json" else content)
    return box.getvalue()


@st.composite
def bundle_cases(draw: st.DrawFn, kind: str, bundle: bytes, planted: Planted) -> Case:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(sorted(members)))
    if kind == "valid":
        journal = next(key for key in members if key.endswith(".jsonl"))
        first, *rest = members[journal].splitlines(keepends=True)
        noted = json.loads(first) | {"note": draw(st.text(max_size=8)), "more": draw(st.integers())}
        members[journal] = lines_of([noted]) + b"".join(rest)
        return Case(kind, zipped({key: members[key] for key in draw(st.permutations(sorted(members)))}))
    if kind == "broken" and draw(st.booleans()):
        return Case(kind, draw(damaged(bundle)))
    if kind == "broken":
        return Case(
            kind,
            zipped(
                members | {name: draw(damaged(members[name]))}
                if name != "bundle.json"
                else {**members, "x": b""}
            ),
        )
    if name.endswith(".jsonl"):
        events = [json.loads(line) for line in members[name].splitlines()]
        members[name] = lines_of(draw(mutations(events)))
    elif name.endswith(".json"):
        members[name] = dumped(draw(mutations(json.loads(members[name]))))
    else:
        members[name] = draw(st.one_of(damaged(members[name]), st.just(planted.pickled)))
    return Case(kind, zipped(members))


def test_a_bundle_is_imported_whole_or_refused_and_then_nothing_is_written(
    times: int,
    resolved: ResolvedStudy,
    ssmscale: Command,
    tmp_path: Path,
    planted: Planted,
) -> None:
    finish_all(resolved)
    assert ssmscale("export", "tiny", "--out", "whole.zip").status == 0
    whole, path, here = Path("whole.zip").read_bytes(), tmp_path / "case.zip", tmp_path / "here"

    def check(case: Case) -> None:
        path.write_bytes(case.content)
        shutil.rmtree(here, ignore_errors=True)
        before = hashes(tmp_path)
        answer = ssmscale("import", path, "--root", here)
        planted.assert_not_executed()
        if refused(answer, path.name):
            assert case.kind != "valid", answer.err
            assert hashes(tmp_path) == before
            return
        after = hashes(tmp_path)
        assert {name: after[name] for name in before} == before
        assert all(name.startswith("here") for name in after if name not in before)
        for folder in (here / "runs").iterdir():
            assert read_run(folder).run_id == folder.name
            assert read_progress(folder).state == Event.FINISHED
        first = hashes(here)
        assert ssmscale("import", path, "--root", here).status == 0
        assert hashes(here) == first
        assert ssmscale("status", "tiny", "--root", here).status == 0

    repeat(16 * times, lambda kind: bundle_cases(kind, whole, planted), check)
