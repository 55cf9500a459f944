"""Changed and hostile checkpoints and bundles are whole, or refused without an effect."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from harness.record import checkpoints
from harness.record.journal import Event, read_progress
from harness.record.registry import ResolvedStudy
from harness.record.root import read_run
from tests.conftest import Command
from tests.harness.bundles import members_of, rewritten
from tests.harness.fuzzing import Case, Planted, damaged, dumped, hashes, mutations, refused, repeat, strictly
from tests.harness.journals import finish_all, lines_of

# -- checkpoints


@st.composite
def checkpoint_cases(
    draw: st.DrawFn, kind: str, marker: dict[str, Any], content: bytes, planted: Planted
) -> Case:
    if kind == "valid":
        changed = {"tokens": draw(st.integers(0, 2**62)), "branch": draw(st.booleans())}
        return Case(kind, (dumped(marker | changed), content))
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


def test_a_checkpoint_is_valid_or_has_a_problem_and_pruning_touches_nothing_else(
    times: int, resolved: ResolvedStudy, ssmscale: Command, tmp_path: Path, planted: Planted
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
        problems = [checkpoints.inspect(held) for held in checkpoints.marked(folder)]
        if case.kind == "valid":
            assert problems == [None]
        before = hashes(tmp_path)
        answer = ssmscale("prune", "tiny", "--json")
        planted.assert_not_executed()
        assert not refused(answer)
        after = hashes(tmp_path)
        gone = {name for name in before if name not in after}
        assert all("checkpoints/step-000000008" in name for name in gone)
        assert not gone or case.kind != "valid"
        assert all(before[name] == after[name] for name in after if name in before and "control" not in name)
        assert gone or not strictly(answer.out)["removed"]

    repeat(12 * times, lambda kind: checkpoint_cases(kind, marker, content, planted), check)


# -- bundles


@st.composite
def bundle_cases(draw: st.DrawFn, kind: str, bundle: Path, planted: Planted) -> Case:
    members = members_of(bundle)
    name = draw(st.sampled_from(sorted(members)))
    if kind == "valid":
        journal = next(key for key in members if key.endswith(".jsonl"))
        first, *rest = members[journal].splitlines(keepends=True)
        noted = json.loads(first) | {"note": draw(st.text(max_size=8)), "more": draw(st.integers())}
        members[journal] = lines_of([noted]) + b"".join(rest)
        return Case(kind, {key: members[key] for key in draw(st.permutations(sorted(members)))})
    if kind == "broken" and draw(st.booleans()):
        return Case(kind, draw(damaged(bundle.read_bytes())))
    if kind == "broken":
        spoilt = {"x": b""} if name == "bundle.json" else {name: draw(damaged(members[name]))}
        return Case(kind, members | spoilt)
    if name.endswith(".jsonl"):
        events = [json.loads(line) for line in members[name].splitlines()]
        members[name] = lines_of(draw(mutations(events)))
    elif name.endswith(".json"):
        members[name] = dumped(draw(mutations(json.loads(members[name]))))
    else:
        members[name] = draw(st.one_of(damaged(members[name]), st.just(planted.pickled)))
    return Case(kind, members)


def test_a_bundle_is_imported_whole_or_refused_without_writing_anything(
    times: int, resolved: ResolvedStudy, ssmscale: Command, tmp_path: Path, planted: Planted
) -> None:
    finish_all(resolved)
    assert ssmscale("export", "tiny", "--out", "whole.zip").status == 0
    whole, path, here = Path("whole.zip"), tmp_path / "case.zip", tmp_path / "here"

    def check(case: Case) -> None:
        if isinstance(case.content, bytes):
            path.write_bytes(case.content)
        else:
            rewritten(case.content, path)
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
