"""Reading a bundle from elsewhere: everything in it is checked before anything of it is used.

The archive is unpacked into a folder of its own, its names and sizes checked first, and there its runs are read as any
others: an id is the hash of its run.json, a Series is that of its Runs, a journal holds valid lines and ends with a
whole result, an evaluation is named after its settings. Nothing of it is executed, and ROOT is not touched.
"""

from __future__ import annotations

import hashlib
import json
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

MOST_BYTES = 8 * 2**30
"""Bytes a bundle may hold unpacked: journals of a hundred thousand runs."""
MOST_MEMBER_BYTES = 2**30
MOST_CONTENTS_BYTES = 2**27
MOST_RATIO = 200
"""Times a bundle above SMALL_BYTES may grow in unpacking; journals grow five- to thirtyfold."""
SMALL_BYTES = 2**24
CHUNK = 2**20


@dataclass(frozen=True)
class OpenBundle:
    """A bundle that holds what it says, unpacked."""

    path: Path
    contents: Contents
    unpacked: Root
    """Folder of its runs and series, study.json and calibration.json while it is open."""
    registration: Registration
    runs: tuple[Run, ...]


@contextmanager
def open_bundle(path: Path) -> Iterator[OpenBundle]:
    """Unpack and check a bundle; what was unpacked goes when the block ends.

    Raises InputError naming the file, the member and what is wrong with it.
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
            raise InputError(f"{path}: is no whole zip archive ({first_line(error)})") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        try:
            bundle = _check_contents(path, contents, Root(folder))
        except InputError as error:  # a file of the unpacked copy is a member to whoever reads this
            raise InputError(str(error).replace(f"{folder}/", f"{path}: ")) from error
        yield bundle


def _check_names(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members by name, once each of them is a plain file with a name and a size a bundle may have."""
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename
        where = f"{path}: member {info.orig_filename!r}"
        if name != info.orig_filename or (name != CONTENTS and not MEMBER.fullmatch(name)):
            raise InputError(f"{where}: is no name of anything a bundle holds")
        if name in infos:
            raise InputError(f"{where}: is there twice")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in {0, stat.S_IFREG} or info.flag_bits & 1:
            raise InputError(f"{where}: is no plain file (a link, a device or encrypted)")
        if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise InputError(f"{where}: is compressed by method {info.compress_type}; bundles are deflated")
        if info.file_size > MOST_MEMBER_BYTES:
            raise InputError(
                f"{where}: would unpack to {info.file_size:,} bytes; at most {MOST_MEMBER_BYTES:,}"
            )
        infos[name] = info
    total, packed = sum(info.file_size for info in infos.values()), path.stat().st_size
    if total > MOST_BYTES or (total > SMALL_BYTES and total > MOST_RATIO * packed):
        raise InputError(f"{path}: {packed:,} bytes would unpack to {total:,}; is this a bundle?")
    return infos


class _Head(Frozen, extra="ignore"):
    format: WholeNumber


def _read_contents(archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], path: Path) -> Contents:
    if CONTENTS not in infos or infos[CONTENTS].file_size > MOST_CONTENTS_BYTES:
        raise InputError(f"{path}: has no {CONTENTS}; `ssmscale export` writes bundles")
    text = archive.read(infos[CONTENTS])
    try:
        head = _Head.model_validate_json(text)
        if head.format != FORMAT:
            raise InputError(
                f"{path}: {CONTENTS}: format: {head.format}: this version reads format {FORMAT} alone"
            )
        contents = Contents.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{path}: {CONTENTS}: {first_mistake(error)}") from error
    listed, held = set(contents.members), set(infos) - {CONTENTS}
    for name in sorted(listed ^ held):
        missing = "is listed and not there" if name in listed else "is there and not listed"
        raise InputError(f"{path}: member {name!r}: {missing}")
    if "study.json" not in held:
        raise InputError(f"{path}: member 'study.json': is missing")
    if contents.counts != count_members(held):
        raise InputError(f"{path}: {CONTENTS}: counts: are not those of its members")
    return contents


def _unpack(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, contents: Contents, folder: Path, path: Path
) -> None:
    """Write one member below `folder`, no more of it than bundle.json says there is."""
    facts, target = contents.members[info.filename], folder / info.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with archive.open(info) as source, target.open("xb") as file:
        while part := source.read(CHUNK):
            size += len(part)
            if size > facts.bytes:
                break
            digest.update(part)
            file.write(part)
    if size != facts.bytes or digest.hexdigest() != facts.sha256:
        raise InputError(f"{path}: member {info.filename!r}: is not what {CONTENTS} lists (size or checksum)")


def _check_contents(path: Path, contents: Contents, unpacked: Root) -> OpenBundle:
    folder = unpacked.path
    registration = read_model(folder / "study.json", Registration)
    if registration.study.name != contents.study:
        raise InputError(
            f"{folder}/study.json: study.name: {registration.study.name!r}: is not {contents.study!r}"
        )
    read_model_if_there(folder / "calibration.json", Calibration)
    listed = {point.run_id for point in registration.expand(f"{folder}/study.json")}
    runs = [read_run(run_dir) for run_dir in sorted(_below(folder / "runs"))]
    for run in runs:
        if run.run_id not in listed:
            raise InputError(f"{unpacked.run(run.run_id)}/run.json: is no run of the study {contents.study}")
        _check_series(unpacked, run)
        _check_run(unpacked.run(run.run_id), run)
        list(evaluations_of(unpacked, run.run_id, check_names=True))
    held = {run.series_id for run in runs}
    for series_dir in _below(folder / "series"):
        if series_dir.name not in held:
            raise InputError(f"{series_dir}/series.json: none of the bundle's runs is of this series")
        _read_checked(series_dir)
    return OpenBundle(path, contents, unpacked, registration, tuple(runs))


def _below(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _check_series(unpacked: Root, run: Run) -> None:
    path = unpacked.series(run.series_id) / "series.json"
    try:
        held = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: is missing, and run {run.run_id} is of this series") from None
    except (ValueError, RecursionError) as error:
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
