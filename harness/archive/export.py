"""A bundle: the finished Runs of a study in one file, for another machine, a publication or an archive.

It holds identities, journals and the scores of evaluations, from which points, fits and MLflow's runs can be made
again, but no weights, logs or sound. bundle.json lists every member with size and SHA-256. It names no host, and the
same Runs give the same bytes. The addresses of tracker and database are left out: an import must not
send journals and the user's logins to a server that another user chose. check.py reads a bundle, merge.py adds it to a
ROOT.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from harness.common.jsonl import Damage, LineReader
from harness.record.journal import attempt_file, attempts, check_for
from harness.record.points import points_of, write_table
from harness.record.provenance import commit, installed_version
from harness.record.registry import ResolvedStudy
from harness.record.scores import evaluations_of
from harness.record.status import RunState, RunStatus, StatusReader
from harness.study.run import Frozen, WholeNumber
from ssmttm.errors import InputError
from ssmttm.files import parse_json, read_document, replacing

FORMAT = 1
CONTENTS = "bundle.json"
MEMBER = re.compile(
    r"study\.json|calibration\.json|points\.csv"
    r"|runs/[0-9a-f]{12}/"
    r"(?:run\.json|journal/(?:[0-9]{4}|[1-9][0-9]{4,8})\.jsonl|evaluation/(?:held-out|[0-9a-f]{12})\.json)"
    r"|series/[0-9a-f]{12}/(?:series\.json|journal/(?:[0-9]{4}|[1-9][0-9]{4,8})\.jsonl)"
)
"""Every name a member may have."""


class MemberFacts(Frozen):
    """Size and checksum of one member."""

    bytes: WholeNumber
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Counts(Frozen):
    """Numbers of Runs, Series, journals and evaluations in a bundle."""

    runs: WholeNumber
    series: WholeNumber
    journals: WholeNumber
    evaluations: WholeNumber = 0


class Contents(Frozen):
    """bundle.json: the members of a bundle and the code that made it."""

    format: WholeNumber
    study: str
    counts: Counts
    commit: str | None
    versions: dict[str, str | None]
    members: dict[str, MemberFacts]


def export_bundle(resolved: ResolvedStudy, out: Path) -> Counts:
    """Write the finished Runs of a study to `out`, all or none.

    Raises InputError if the study was never submitted, no Run has finished, `out` cannot be a bundle, or a file of
    scores is damaged or has the wrong name.
    """
    if out.suffix != ".zip":
        raise InputError(f"--out {out}: does not end in .zip")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    name, root = resolved.study.name, resolved.root
    if not (root.study(name) / "study.json").exists():
        raise InputError(f"study {name}: was never submitted under {root.path}; submit it first")
    done = [row for row in StatusReader(root, name).read(resolved.points) if row.state is RunState.DONE]
    if not done:
        raise InputError(f"study {name}: none of its runs has finished under {root.path}")
    with replacing(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        facts: dict[str, MemberFacts] = {}
        for member, content in _members(resolved, done):
            _write(archive, member, content)
            facts[member] = MemberFacts(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        contents = Contents(
            format=FORMAT,
            study=name,
            counts=count_members(facts),
            commit=commit(),
            versions={"ssmscale": installed_version("ssmscale")},
            members=facts,
        )
        # Without scores the counts omit them, so that versions without evaluations can read the bundle.
        _write(archive, CONTENTS, _json(contents.model_dump(mode="json", exclude_defaults=True)))
    return contents.counts


def count_members(names: Collection[str]) -> Counts:
    """Count the Runs, Series, journals and evaluations among these member names."""
    return Counts(
        runs=sum(name.endswith("/run.json") for name in names),
        series=sum(name.endswith("/series.json") for name in names),
        journals=sum("/journal/" in name for name in names),
        evaluations=sum("/evaluation/" in name for name in names),
    )


def _members(resolved: ResolvedStudy, done: list[RunStatus]) -> Iterator[tuple[str, bytes]]:
    root, study = resolved.root, resolved.root.study(resolved.study.name)
    yield "study.json", without_addresses(read_document(study / "study.json"))
    if (study / "calibration.json").exists():
        yield "calibration.json", read_document(study / "calibration.json")
    table = io.StringIO(newline="")
    write_table(points_of(done, root), None, table)
    yield "points.csv", table.getvalue().encode()
    series: set[str] = set()
    for row in done:
        if row.series_id not in series:
            series.add(row.series_id)
            folder = f"series/{row.series_id}"
            yield f"{folder}/series.json", _json(row.point.run.series_canonical())
            yield from _journal(folder, root.series(row.series_id))
        folder = f"runs/{row.run_id}"
        yield f"{folder}/run.json", _json(row.point.run.canonical())
        yield from _journal(folder, root.run(row.run_id))
        for found in evaluations_of(root, row.run_id, check_names=True):
            yield f"{folder}/evaluation/{found.name}.json", _json(found.model_dump(mode="json"))


def _journal(folder: str, directory: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the valid lines of every attempt; torn and damaged lines are left out."""
    for attempt in attempts(directory):
        path = attempt_file(directory, attempt)
        reader, content = LineReader(path), whole_lines(path)
        damaged = {line.number for line in reader.read(check_for(directory)) if isinstance(line, Damage)}
        if damaged:
            lines = content.split(b"\n")[:-1]  # as the reader splits, unlike splitlines
            content = b"".join(line + b"\n" for number, line in enumerate(lines, 1) if number not in damaged)
        if content:
            yield f"{folder}/journal/{path.name}", content


def without_addresses(registration: bytes) -> bytes:
    """Return a study.json without the addresses of its tracker and of Optuna's database."""
    document = parse_json(registration)
    tracking, tune = (document["study"].get(key) or {} for key in ("tracking", "tune"))
    held = [tracking.pop("uri", None), tune.pop("storage", None)]
    return registration if held == [None, None] else json.dumps(document, indent=1).encode() + b"\n"


def whole_lines(path: Path) -> bytes:
    """Read a journal file up to its last end of line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _json(document: object) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def _write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980: with real times, equal bundles would have different bytes
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o100644 << 16
    archive.writestr(info, content)
