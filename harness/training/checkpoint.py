"""Checkpoints that are either whole or not there.

DeepSpeed writes a tag's files from all ranks and is not atomic. So after the last rank's barrier the first rank
writes TAG.complete, with the size and SHA-256 of every file; only a tag whose marker agrees with its files is
resumed from, and before DeepSpeed unpickles any of them each must load under torch's weights_only rules.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from harness.run import Frozen
from harness.rundir import write_atomically

if TYPE_CHECKING:
    from harness.training.engine import Engine

TAG = re.compile(r"step-(\d{9})")


class FileFacts(Frozen):
    """One file of a checkpoint as it was written."""

    bytes: int
    sha256: str


class Marker(Frozen):
    """TAG.complete: written last."""

    step: int
    tokens: int
    """Tokens trained on when it was written."""
    ranks: int
    zero_stage: int
    branch: bool
    """Whether Runs leave the trunk here, so that it is kept; others go when a newer one is whole."""
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, its marker read."""

    folder: Path
    tag: str
    marker: Marker


def tag_of(step: int) -> str:
    """Name of the checkpoint made after that many steps."""
    return f"step-{step:09d}"


def save(engine: Engine, folder: Path, step: int, tokens: int, *, branch: bool = False) -> None:
    """Write a checkpoint from all ranks together and mark it complete; collective.

    Older checkpoints of the folder that no branch needs are dropped once this one is whole.
    """
    import torch

    tag = tag_of(step)
    marker_path = folder / f"{tag}.complete"
    if engine.ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        marker_path.unlink(missing_ok=True)
        shutil.rmtree(folder / tag, ignore_errors=True)
    torch.distributed.barrier()
    engine.deepspeed.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=False)
    torch.distributed.barrier()
    if engine.ranks.is_first:
        files = {
            str(path.relative_to(folder / tag)): FileFacts(bytes=path.stat().st_size, sha256=_sha256(path))
            for path in sorted((folder / tag).rglob("*"))
            if path.is_file()
        }
        marker = Marker(
            step=step,
            tokens=tokens,
            ranks=engine.ranks.world,
            zero_stage=engine.layout.zero_stage,
            branch=branch,
            files=files,
        )
        write_atomically(marker_path, marker.model_dump_json(indent=1) + "\n")
        kept = {held.tag for held in marked(folder) if held.marker.branch or held.marker.step >= step}
        for older in folder.glob("step-*"):
            if older.is_dir() and older.name not in kept and older.name < tag:
                remove(folder, older.name)
    torch.distributed.barrier()


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put an engine back to where a checkpoint was made; collective. Random state is a function of the step."""
    path, _ = engine.deepspeed.load_checkpoint(str(checkpoint.folder), tag=checkpoint.tag)
    if path is None:
        raise RuntimeError(f"{checkpoint.folder / checkpoint.tag}: DeepSpeed loaded nothing from it")


def marked(folder: Path) -> list[Checkpoint]:
    """Checkpoints whose marker is there and whose files have the right sizes, by step."""
    found = []
    for path in folder.glob("step-*.complete"):
        if not TAG.fullmatch(path.stem):
            continue
        try:
            marker = Marker.model_validate_json(path.read_bytes())
        except (ValidationError, OSError):
            continue
        tag_folder = folder / path.stem
        if all(_has_size(tag_folder / name, facts.bytes) for name, facts in marker.files.items()):
            found.append(Checkpoint(folder, path.stem, marker))
    return sorted(found, key=lambda checkpoint: checkpoint.marker.step)


def problem_with(checkpoint: Checkpoint) -> str | None:
    """Why a marked checkpoint must not be loaded, or None: checksums, then torch's safe loading of every file."""
    for name, facts in checkpoint.marker.files.items():
        path = checkpoint.folder / checkpoint.tag / name
        try:
            if _sha256(path) != facts.sha256:
                return f"{path}: differs from what was written (checksum)"
            if path.suffix == ".pt":
                _load_safely(path)
        except Exception as error:  # whatever is wrong with it, it is passed over and reported
            return f"{path}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def keep(folder: Path, step: int, *, branch: bool) -> bool:
    """Whether a whole checkpoint of that step is there; from now on it is kept for branching if `branch` says so."""
    for held in marked(folder):
        if held.marker.step == step:
            if branch and not held.marker.branch:
                marker = held.marker.model_copy(update={"branch": True})
                write_atomically(folder / f"{held.tag}.complete", marker.model_dump_json(indent=1) + "\n")
            return True
    return False


def condemn(checkpoint: Checkpoint) -> None:
    """Take its marker from a checkpoint that was found damaged, so that it counts as not there."""
    marker = checkpoint.folder / f"{checkpoint.tag}.complete"
    marker.rename(marker.with_suffix(".damaged"))


def remove(folder: Path, tag: str) -> None:
    """Drop a checkpoint: its marker first, so that it is never half there."""
    (folder / f"{tag}.complete").unlink(missing_ok=True)
    shutil.rmtree(folder / tag, ignore_errors=True)


def _load_safely(path: Path) -> None:
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(allowed):
        torch.load(path, map_location="meta", weights_only=True)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
