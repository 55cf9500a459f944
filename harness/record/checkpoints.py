"""Checkpoints that are either whole or not there.

DeepSpeed writes a tag's files from all ranks and is not atomic. So after the last rank's barrier the first rank
writes TAG.complete, with the size and SHA-256 of every file and a seal over itself; only a tag whose marker agrees
with all that lies in its folder is resumed from, and before DeepSpeed unpickles any of it each file must load under
torch's weights_only rules.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from harness.common.validation import first_line, first_mistake
from harness.record.root import write_model
from harness.study.run import Frozen
from ssmttm.files import sha256_file

TAG = re.compile(r"step-([0-9]{9})")


def _inside(name: str) -> str:
    """A file's name within its tag; raises ValueError for one that could lead out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != name or "\0" in name:
        raise ValueError("is no file inside the tag")
    return name


class FileFacts(Frozen):
    """One file of a checkpoint as it was written."""

    bytes: int
    sha256: str


class Marker(Frozen):
    """TAG.complete: written last."""

    step: Annotated[int, Field(strict=True, ge=0)]
    tokens: Annotated[int, Field(strict=True, ge=0)]
    """Tokens trained on when it was written."""
    ranks: int
    zero_stage: int
    branch: bool
    """True if Runs leave the trunk here, so that it is kept; of the others the newest are."""
    loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Held-out loss at that step, nats a token, where it was measured."""
    files: dict[Annotated[str, AfterValidator(_inside)], FileFacts]
    seal: str | None = None
    """SHA-256 over all of the above; a checkpoint older than seals has none."""

    @model_validator(mode="after")
    def _is_as_written(self) -> Self:
        if self.seal is not None and self.seal != self._digest():
            raise ValueError("differs from what was written (checksum)")
        return self

    def sealed(self, **changes: Any) -> Marker:
        """The marker with these fields changed and a seal that fits."""
        open_marker = self.model_copy(update={**changes, "seal": None})
        return open_marker.model_copy(update={"seal": open_marker._digest()})

    def _digest(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"seal"}).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, its marker read."""

    folder: Path
    tag: str
    marker: Marker

    @property
    def path(self) -> Path:
        """The folder of its files."""
        return self.folder / self.tag


@dataclass(frozen=True)
class Problem:
    """A reason against loading a checkpoint."""

    text: str
    damaged: Checkpoint | None = None
    """The checkpoint, if it is known to be damaged; a disk that hesitates once must not cost one."""
    tag: str | None = None
    """Tag of a checkpoint that is not known to be damaged and so must stay."""


def tag_of(step: int) -> str:
    """Name of the checkpoint made after that many steps."""
    return f"step-{step:09d}"


def marked(folder: Path) -> list[Checkpoint]:
    """Checkpoints whose marker is there and whose files have the right sizes, by step."""
    return survey(folder)[0]


def survey(folder: Path) -> tuple[list[Checkpoint], list[Problem]]:
    """The `marked` checkpoints of a folder, and why each other marker stands for none; in one look at the disk."""
    found, problems = [], []
    for held in _read_all(folder):
        problem = held if isinstance(held, Problem) else _wrong_sizes(held)
        if problem is not None:
            problems.append(problem)
        elif isinstance(held, Checkpoint):
            found.append(held)
    return sorted(found, key=lambda checkpoint: checkpoint.marker.step), problems


def _read_all(folder: Path) -> Iterator[Checkpoint | Problem]:
    for path in sorted(folder.glob("step-*.complete")):
        if not TAG.fullmatch(path.stem):
            yield Problem(f"{path}: is named after no step")
            continue
        try:
            marker = Marker.model_validate_json(path.read_bytes())
        except ValidationError as error:
            yield Problem(f"{path}: {first_mistake(error)}", tag=path.stem)
        except OSError as error:
            yield Problem(f"{path}: cannot be read ({error.strerror})", tag=path.stem)
        else:
            if tag_of(marker.step) != path.stem:
                yield Problem(f"{path}: is the marker of step {marker.step}")
            else:
                yield Checkpoint(folder, path.stem, marker)


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


def problem_with(checkpoint: Checkpoint) -> str | None:
    """Say why a marked checkpoint must not be loaded; None where nothing is wrong."""
    problem = inspect(checkpoint)
    return None if problem is None else problem.text


def inspect(checkpoint: Checkpoint) -> Problem | None:
    """Verify a checkpoint: exactly the files it lists, their checksums, then torch's safe loading of each."""
    try:
        if foreign := _foreign(checkpoint):
            return Problem(f"{foreign}: is not one of the files it was written with", checkpoint)
        for name, facts in checkpoint.marker.files.items():
            path = checkpoint.path / name
            if sha256_file(path) != facts.sha256:
                return Problem(f"{path}: differs from what was written (checksum)", checkpoint)
            if problem := _unsafe(path):
                return Problem(f"{path}: {problem}", checkpoint)
    except OSError as error:
        return Problem(f"{error.filename or checkpoint.path}: cannot be read ({error.strerror})")
    return None


def _foreign(checkpoint: Checkpoint) -> Path | None:
    """Find a path in the tag that is neither a listed plain file nor a folder: DeepSpeed takes files by pattern."""
    if checkpoint.path.is_symlink():
        return checkpoint.path
    for place, folders, files in os.walk(checkpoint.path, onerror=_raise):
        for name in (*folders, *files):
            # A hidden file no pattern takes; NFS keeps a file so that is removed while it is read.
            if name.startswith("."):
                continue
            path = Path(place) / name
            listed = path.relative_to(checkpoint.path).as_posix() in checkpoint.marker.files
            if path.is_symlink() or not (path.is_dir() or (listed and path.is_file())):
                return path
    return None


def _raise(error: OSError) -> None:
    raise error


def _unsafe(path: Path) -> str | None:
    try:
        load_safely(path, "meta")
    except OSError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def load_safely(path: Path | str, device: Any) -> Any:
    """Load a file of a checkpoint: the classes DeepSpeed's checkpoints are made of and no others.

    Raises pickle.UnpicklingError for any other.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location=device, weights_only=True)


def keep(folder: Path, step: int, *, branch: bool, verified: bool = False) -> bool:
    """True if a whole checkpoint of that step is there; from now on it is kept for branching if `branch` says so.

    Unless it is `verified`, it is looked through first: one that is damaged is not there, and is written again.
    """
    for held in marked(folder):
        if held.marker.step == step:
            if not verified and inspect(held) is not None:
                return False
            if branch and not held.marker.branch:
                marker = held.marker.sealed(branch=True)
                write_model(folder / f"{held.tag}.complete", marker)
            return True
    return False


def condemn(checkpoint: Checkpoint) -> None:
    """Take its marker from a checkpoint that was found damaged, so that it counts as not there."""
    marker = checkpoint.folder / f"{checkpoint.tag}.complete"
    marker.rename(marker.with_suffix(".damaged"))


def remove(folder: Path, tag: str) -> None:
    """Drop a checkpoint: its marker first, so that it is never half there."""
    for ending in (".complete", ".damaged"):
        (folder / f"{tag}{ending}").unlink(missing_ok=True)
    shutil.rmtree(folder / tag, ignore_errors=True)


def retire(folder: Path, step: int, *, keep_last: int, keep_best: bool) -> None:
    """Drop checkpoints that the one of `step`, whole by now, makes superfluous.

    Branch points stay, the newest `keep_last` others up to `step`, those beyond it, and with `keep_best` the one of the
    lowest held-out loss. What never became whole goes; what has a marker that cannot be read is left alone.
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
    """Remove what was being saved when its process ended, to make room; for the holder of the Series' lock alone."""
    for path in folder.glob("step-*"):
        endings = (".complete", ".damaged")
        if TAG.fullmatch(path.name) and not any(
            (folder / f"{path.name}{ending}").exists() for ending in endings
        ):
            shutil.rmtree(path, ignore_errors=True)


def best_first(held: Iterable[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints with a held-out loss, the lowest first, of equal ones the earliest."""
    measured = [
        (found.marker.loss, found.marker.step, found) for found in held if found.marker.loss is not None
    ]
    return [found for _, _, found in sorted(measured, key=lambda entry: entry[:2])]
