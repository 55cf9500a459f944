"""Reading a bundle from another machine: every member is checked before any is used.

The archive is unpacked into a temporary folder, after a check of names and sizes. There its runs are read like any
others: an id is the hash of its run.json, a Series is that of its Runs, a journal holds valid lines and ends with a
whole result, an evaluation is named after its settings. No member is executed, and ROOT stays unchanged.
"""

from __future__ import annotations

import hashlib
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from harness.archive.export import CONTENTS, FORMAT, MEMBER, Contents, count_members
from harness.common.validation import first_line, first_mistake
from harness.plan.speed import Calibration
from harness.record.journal import Event, Progress, attempts, read_progress
from harness.record.registry import Registration
from harness.record.result import Result
from harness.record.root import Root, read_model, read_model_if_there, read_run
from harness.record.scores import evaluations_of
from harness.study.run import Frozen, Run, WholeNumber
from ssmttm.errors import InputError
from ssmttm.files import parse_json, read_document

MAX_BYTES = 8 * 2**30
"""Most bytes of an unpacked bundle: journals of a hundred thousand runs."""
MAX_MEMBER_BYTES, MAX_CONTENTS_BYTES = 2**30, 2**27
SMALL_BYTES, MAX_RATIO = 2**24, 200
"""Most times that a bundle above SMALL_BYTES may grow in unpacking; journals grow five- to thirtyfold."""


@dataclass(frozen=True)
class OpenBundle:
    """An unpacked bundle that passed all checks."""

    contents: Contents
    unpacked: Root
    """Temporary folder of its runs and series, study.json and calibration.json."""
    runs: tuple[Run, ...]


@contextmanager
def open_bundle(path: Path) -> Iterator[OpenBundle]:
    """Unpack and check a bundle; the unpacked copy is removed when the block ends.

    Raises InputError naming the file, the member and the mistake.
    """
    with tempfile.TemporaryDirectory(prefix="ssmscale-bundle-") as name:
        folder = Path(name)
        try:
            with zipfile.ZipFile(path) as archive:
                infos = _check_names(archive, path)
                contents = _read_contents(archive, infos, path)
                for member, info in infos.items():
                    if member != CONTENTS:
                        _unpack(archive, info, contents, folder, path)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeError) as error:
            raise InputError(f"{path}: is not a complete zip archive ({first_line(error)})") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        try:
            runs = _check_contents(contents, Root(folder))
        except InputError as error:  # the user knows the members, and not their unpacked copies
            raise InputError(str(error).replace(f"{folder}/", f"{path}: ")) from error
        yield OpenBundle(contents, Root(folder), runs)


def _check_names(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name; raises InputError unless each is a plain file with an allowed name and size."""
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename
        where = f"{path}: member {info.orig_filename!r}"
        if name != info.orig_filename or (name != CONTENTS and not MEMBER.fullmatch(name)):
            raise InputError(f"{where}: is not the name of a bundle's member")
        if name in infos:
            raise InputError(f"{where}: occurs twice")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in {0, stat.S_IFREG} or info.flag_bits & 1:
            raise InputError(f"{where}: is not a plain file (a link, a device or encrypted)")
        if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise InputError(f"{where}: is compressed by method {info.compress_type}; bundles are deflated")
        if info.file_size > MAX_MEMBER_BYTES:
            raise InputError(f"{where}: would unpack to more than {MAX_MEMBER_BYTES:,} bytes")
        infos[name] = info
    total, packed = sum(info.file_size for info in infos.values()), path.stat().st_size
    if total > MAX_BYTES or (total > SMALL_BYTES and total > MAX_RATIO * packed):
        raise InputError(f"{path}: {packed:,} bytes would unpack to {total:,}; is this a bundle?")
    return infos


class _Head(Frozen, extra="ignore"):
    format: WholeNumber


def _read_contents(archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], path: Path) -> Contents:
    if CONTENTS not in infos or infos[CONTENTS].file_size > MAX_CONTENTS_BYTES:
        raise InputError(f"{path}: has no {CONTENTS}; `ssmscale export` writes bundles")
    text = archive.read(infos[CONTENTS])
    try:
        head = _Head.model_validate_json(text)
        if head.format != FORMAT:
            problem = f"format: {head.format}: this version reads only format {FORMAT}"
            raise InputError(f"{path}: {CONTENTS}: {problem}")
        contents = Contents.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{path}: {CONTENTS}: {first_mistake(error)}") from error
    listed, held = set(contents.members), set(infos) - {CONTENTS}
    for name in sorted(listed ^ held):
        problem = "is missing" if name in listed else f"is not listed in {CONTENTS}"
        raise InputError(f"{path}: member {name!r}: {problem}")
    if "study.json" not in held:
        raise InputError(f"{path}: member 'study.json': is missing")
    if contents.counts != count_members(held):
        raise InputError(f"{path}: {CONTENTS}: counts: are not those of its members")
    return contents


def _unpack(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, contents: Contents, folder: Path, path: Path
) -> None:
    """Write one member below `folder`, at most as many bytes as bundle.json lists."""
    facts, target = contents.members[info.filename], folder / info.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with archive.open(info) as source, target.open("xb") as file:
        while part := source.read(2**20):
            size += len(part)
            if size > facts.bytes:
                break
            digest.update(part)
            file.write(part)
    if size != facts.bytes or digest.hexdigest() != facts.sha256:
        raise InputError(f"{path}: member {info.filename!r}: differs from {CONTENTS} (size or checksum)")


def _check_contents(contents: Contents, unpacked: Root) -> tuple[Run, ...]:
    folder = unpacked.path
    path = folder / "study.json"
    registration = read_model(path, Registration)
    if registration.study.name != contents.study:
        raise InputError(f"{path}: study.name: {registration.study.name!r}: is not {contents.study!r}")
    read_model_if_there(folder / "calibration.json", Calibration)
    listed = {point.run_id for point in registration.expand(str(path))}
    runs = [read_run(run_dir) for run_dir in sorted(folder.glob("runs/*"))]
    for run in runs:
        run_dir = unpacked.run(run.run_id)
        if run.run_id not in listed:
            raise InputError(f"{run_dir}/run.json: is not a run of the study {contents.study}")
        _check_series(unpacked, run)
        _check_run(run_dir, run)
        list(evaluations_of(unpacked, run.run_id, check_names=True))
    held = {run.series_id for run in runs}
    for series_dir in folder.glob("series/*"):
        if series_dir.name not in held:
            raise InputError(f"{series_dir}/series.json: none of the bundle's runs is of this series")
        _read_checked(series_dir)
    return tuple(runs)


def _check_series(unpacked: Root, run: Run) -> None:
    path = unpacked.series(run.series_id) / "series.json"
    try:
        held = parse_json(read_document(path))
    except FileNotFoundError:
        raise InputError(f"{path}: is missing, though run {run.run_id} is of this series") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({first_line(error)})") from error
    if held != run.series_canonical():
        raise InputError(f"{path}: is not the series of run {run.run_id}")


def _check_run(run_dir: Path, run: Run) -> None:
    progress = _read_checked(run_dir)
    if progress.state != Event.FINISHED or progress.result is None:
        raise InputError(f"{run_dir}/journal: does not end with a finished run")
    try:
        result = Result.of_event(progress.result)
    except ValidationError as error:
        raise InputError(f"{run_dir}/journal: {first_mistake(error)}") from error
    if result.step != run.iterations:
        raise InputError(f"{run_dir}/journal: ends at step {result.step} of {run.iterations}")


def _read_checked(directory: Path) -> Progress:
    """Read a journal; raises InputError unless every line of every attempt is valid."""
    if not attempts(directory) and directory.parent.name == "runs":
        raise InputError(f"{directory}/journal: is missing")
    progress = read_progress(directory)
    for note in progress.damaged:
        raise InputError(note)
    return progress
