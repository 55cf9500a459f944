"""scale_up.json of a study: every step up that was proposed, oldest first; nothing in it is ever changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.disk import naming_a_full_disk
from harness.rundir import Root, write_atomically
from ssmttm.errors import InputError


def record_path(root: Root, study: str) -> Path:
    """Where they are kept."""
    return root.study(study) / "scale_up.json"


def read_records(root: Root, study: str) -> list[dict[str, Any]]:
    """What was proposed, each with when it was (`made`); raises InputError where the file is no such list."""
    path = record_path(root, study)
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        records = None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(
            f"{path}: is not the list of proposals that `ssmscale scale-up` writes; move it away"
        )
    return records


def add_record(root: Root, study: str, proposed: Mapping[str, Any]) -> None:
    """Add a proposal under a lock, unless it repeats the newest; raises DiskFull."""
    path = record_path(root, study)
    with naming_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            records = read_records(root, study)
            if records and {key: value for key, value in records[-1].items() if key != "made"} == proposed:
                return
            records.append({"made": datetime.now(UTC).isoformat(timespec="seconds"), **proposed})
            write_atomically(path, json.dumps(records, indent=1, allow_nan=False) + "\n")
