"""Who is to train a Series: a claim file made with O_EXCL, so that two submissions never hand over the same one.

A claim names the array of jobs it was made for. It ends when those jobs have, or when they turn out never to have
been submitted; whoever finds that takes the claim away by renaming it, which one process alone can do.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.disk import drop_draft, naming_a_full_disk, sync_folder
from harness.run import Frozen


class Claim(Frozen):
    """claim.json of a Series."""

    study: str
    """The study that claims it, by name."""
    array: str
    """Name of the array of jobs it was made for."""
    process: dict[str, Any]
    """Who made it, as process.identify_process says."""
    t: float
    """When it was made, seconds since 1970."""


NOBODYS = Claim(study="", array="", process={}, t=0.0)
"""What a damaged claim is read as."""


def make_claim(series_dir: Path, claim: Claim) -> bool:
    """Claim a Series; False where another claim is there. Raises DiskFull."""
    path = series_dir / "claim.json"
    draft = path.with_name(f".claim.{uuid.uuid4().hex[:8]}")
    try:
        with naming_a_full_disk(path), draft.open("x", encoding="utf-8") as file:
            file.write(claim.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # whole when it appears, and refused where there is one
        sync_folder(series_dir)
    except FileExistsError:
        return False
    finally:
        drop_draft(draft)
    return True


def read_claim(series_dir: Path) -> Claim | None:
    """The claim on a Series; a damaged one is nobody's."""
    try:
        return Claim.model_validate_json((series_dir / "claim.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        return NOBODYS


def drop_claim(series_dir: Path, claim: Claim) -> None:
    """Take a claim away that is over; nothing happens where another has come in its place."""
    path = series_dir / "claim.json"
    aside = path.with_name(f".claim.{uuid.uuid4().hex[:8]}")
    try:
        with naming_a_full_disk(path):
            path.rename(aside)
    except FileNotFoundError:
        return
    taken = NOBODYS
    with contextlib.suppress(ValidationError):
        taken = Claim.model_validate_json(aside.read_bytes())
    if taken != claim:  # somebody else dropped it first and claimed the Series: give it back
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
