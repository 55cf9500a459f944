"""Checkpoints that are either whole or absent.

DeepSpeed's ranks write the files of a tag one by one. The first rank then writes the marker TAG.complete, with the size
and SHA-256 of every file. Training resumes only from a tag that agrees with its marker and loads under torch's
weights_only rules.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from harness.common.disk import check_inside
from harness.common.validation import first_line, first_mistake
from harness.record.root import write_model
from harness.study.run import Frozen
from ssmttm.files import read_document, sha256_file

TAG = re.compile(r"step-([0-9]{9})")


def _inside(name: str) -> str:
    """Return a file's name within its tag; raises ValueError if it could lead out of the tag."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != name or "\0" in name:
        raise ValueError("is not the name of a file inside the tag")
    return name


class FileFacts(Frozen):
    """One file of a checkpoint as it was written."""

    bytes: int
    sha256: str


class Marker(Frozen):
    """TAG.complete, the file of a checkpoint that is written last."""

    step: Annotated[int, Field(strict=True, ge=0)]
    tokens: Annotated[int, Field(strict=True, ge=0)]
    """Tokens trained on so far."""
    ranks: int
    zero_stage: int
    branch: bool
    """True if Runs branch off the trunk here; such a checkpoint is always kept."""
    loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Held-out loss at that step in nats a token, if it was measured."""
    files: dict[Annotated[str, AfterValidator(_inside)], FileFacts]
    seal: str | None = None
    """SHA-256 over all other fields; old checkpoints have none."""

    @model_validator(mode="after")
    def _is_as_written(self) -> Self:
        if self.seal is not None and self.seal != self._digest():
            raise ValueError("differs from what was written (checksum)")
        return self

    def sealed(self, **changes: Any) -> Marker:
        """Return the marker with these fields changed and its seal renewed."""
        open_marker = self.model_copy(update={**changes, "seal": None})
        return open_marker.model_copy(update={"seal": open_marker._digest()})

    def _digest(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"seal"}).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint with its marker."""

    folder: Path
    tag: str
    marker: Marker

    @property
    def path(self) -> Path:
        """Folder of its files."""
        return self.folder / self.tag


@dataclass(frozen=True)
class Problem:
    """A reason against loading a checkpoint."""

    text: str
    damaged: Checkpoint | None = None
    """The checkpoint if it is certainly damaged: one failed reading of a disk must not cost a checkpoint."""
    tag: str | None = None
    """Tag of a checkpoint that may be whole and must be kept."""


def tag_of(step: int) -> str:
    """Return the tag of the checkpoint after that many steps."""
    return f"step-{step:09d}"


def marked(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints that have a marker and files of the right sizes, by step."""
    return survey(folder)[0]


def survey(folder: Path) -> tuple[list[Checkpoint], list[Problem]]:
    """Return the `marked` checkpoints of a folder and a Problem for each other marker."""
    found, problems = [], []
    for path in sorted(folder.glob("step-*.complete")):
        held = _read_marker(path)
        if isinstance(held, Checkpoint):
            held = _wrong_sizes(held) or held
        if isinstance(held, Problem):
            problems.append(held)
        else:
            found.append(held)
    return sorted(found, key=lambda checkpoint: checkpoint.marker.step), problems


def _read_marker(path: Path) -> Checkpoint | Problem:
    if not TAG.fullmatch(path.stem):
        return Problem(f"{path}: its name is not that of a step")
    try:
        marker = Marker.model_validate_json(read_document(path))
    except ValidationError as error:
        return Problem(f"{path}: {first_mistake(error)}", tag=path.stem)
    except OSError as error:
        return Problem(f"{path}: cannot be read ({error.strerror})", tag=path.stem)
    if tag_of(marker.step) != path.stem:
        return Problem(f"{path}: is the marker of step {marker.step}")
    return Checkpoint(path.parent, path.stem, marker)


def _wrong_sizes(checkpoint: Checkpoint) -> Problem | None:
    for name, facts in checkpoint.marker.files.items():
        path = checkpoint.path / name
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            return Problem(f"{path}: {error.strerror}", checkpoint)
        except OSError as error:
            return Problem(f"{path}: cannot be read ({error.strerror})", tag=checkpoint.tag)
        if size != facts.bytes:
            return Problem(f"{path}: holds {size} bytes of {facts.bytes}", checkpoint)
    return None


def inspect(checkpoint: Checkpoint, on_file: Callable[[], None] = lambda: None) -> Problem | None:
    """Verify that a checkpoint holds only the files of its marker, with their checksums, and that torch loads them.

    `on_file` is called before each file.
    """
    try:
        if foreign := _foreign(checkpoint):
            return Problem(f"{foreign}: is not one of the files the checkpoint was written with", checkpoint)
        for name, facts in checkpoint.marker.files.items():
            path = checkpoint.path / name
            on_file()
            if sha256_file(path) != facts.sha256:
                return Problem(f"{path}: differs from what was written (checksum)", checkpoint)
            try:
                load_safely(path, "meta")
            except OSError:
                raise
            except Exception as error:
                return Problem(f"{path}: {type(error).__name__}: {first_line(error)}", checkpoint)
    except OSError as error:
        return Problem(f"{error.filename or checkpoint.path}: cannot be read ({error.strerror})")
    return None


def _foreign(checkpoint: Checkpoint) -> Path | None:
    """Return a path in the tag that is neither a listed plain file nor a folder: DeepSpeed finds files by pattern."""
    if checkpoint.path.is_symlink():
        return checkpoint.path
    for place, folders, files in os.walk(checkpoint.path, onerror=_raise):
        for name in (*folders, *files):
            # No pattern matches hidden files; NFS hides a file that is removed while it is read.
            if name.startswith("."):
                continue
            path = Path(place) / name
            listed = path.relative_to(checkpoint.path).as_posix() in checkpoint.marker.files
            if path.is_symlink() or not (path.is_dir() or (listed and path.is_file())):
                return path
    return None


def _raise(error: OSError) -> None:
    raise error


def load_safely(path: Path | str, device: Any) -> Any:
    """Load a file of a checkpoint; raises pickle.UnpicklingError for classes that no checkpoint of DeepSpeed needs."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(allowed):
        return torch.serialization.load(path, map_location=device, weights_only=True)


@contextmanager
def loading_safely() -> Iterator[None]:
    """Make torch.load, which DeepSpeed has unpickle whatever it finds, follow `load_safely` during the block."""
    import torch

    usual = torch.load
    torch.load = lambda path, map_location=None, **_: load_safely(path, map_location)
    try:
        yield
    finally:
        torch.load = usual


def keep(folder: Path, step: int, *, branch: bool, verified: bool = False) -> bool:
    """True if the checkpoint of a step is whole, inspected unless `verified`; with `branch` it is marked to stay."""
    held = next((found for found in marked(folder) if found.marker.step == step), None)
    if held is None or not (verified or inspect(held) is None):
        return False
    if branch and not held.marker.branch:
        write_model(folder / f"{held.tag}.complete", held.marker.sealed(branch=True))
    return True


def condemn(checkpoint: Checkpoint) -> None:
    """Rename the marker of a damaged checkpoint, so that the checkpoint counts as absent."""
    marker = checkpoint.folder / f"{checkpoint.tag}.complete"
    marker.rename(marker.with_suffix(".damaged"))


def remove(folder: Path, tag: str) -> None:
    """Remove a checkpoint, its marker first: a marker must not outlive its files. Raises InputError for a link."""
    _check_folder(folder)
    for marker in _markers(folder, tag):
        marker.unlink(missing_ok=True)
    shutil.rmtree(folder / tag, ignore_errors=True)


def _check_folder(folder: Path) -> None:
    """Raise InputError if the checkpoints of a run or series are elsewhere, through a link of it or of its folder."""
    check_inside(folder.parents[1], folder / "step")


def _markers(folder: Path, tag: str) -> list[Path]:
    return [folder / f"{tag}{ending}" for ending in (".complete", ".damaged")]


def retire(folder: Path, step: int, *, keep_last: int, keep_best: bool) -> None:
    """Remove the checkpoints that the whole one of `step` replaces.

    Keep branch points, the newest `keep_last` others up to `step`, all later ones, and with `keep_best` the one with
    the lowest held-out loss. Remove unfinished ones, but none with a marker that cannot be read.
    """
    held = marked(folder)
    others = [found for found in held if not found.marker.branch and found.marker.step <= step]
    kept = {found.tag for found in held if found.marker.branch or found.marker.step > step}
    kept |= {found.tag for found in others[-keep_last:]} | {tag_of(step)}
    if keep_best:
        kept |= {best.tag for best in best_first(held)[:1]}
    for older in folder.glob("step-*"):
        is_one = older.is_dir() and TAG.fullmatch(older.name) and older.name < tag_of(step)
        known = any(found.tag == older.name for found in held)
        if is_one and older.name not in kept and (known or not (folder / f"{older.name}.complete").exists()):
            remove(folder, older.name)


def remove_partial(folder: Path) -> None:
    """Remove checkpoints whose saving was interrupted; call it only while holding the Series' lock."""
    for path in folder.glob("step-*"):
        if TAG.fullmatch(path.name) and not any(marker.exists() for marker in _markers(folder, path.name)):
            remove(folder, path.name)


def best_first(held: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints with a held-out loss, the lowest first, and the earliest first among equals."""
    measured = [found for found in held if found.marker.loss is not None]
    return sorted(measured, key=lambda found: (found.marker.loss, found.marker.step))
