"""Bundles of tiny studies, taken apart, changed and put together again."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.archive.check import open_bundle
from harness.archive.export import count_members, export_bundle
from harness.archive.merge import Imported, merge
from harness.record.root import Root
from tests.harness.journals import registered
from tests.studies import Fields

Members = dict[str, bytes]


def exported(root: Root, fields: Fields, out: Path) -> Path:
    export_bundle(registered(root, fields), out)
    return out


def imported(bundle: Path, root: Root) -> Imported:
    with open_bundle(bundle) as opened:
        return merge(opened, root)


def members_of(bundle: Path) -> Members:
    with zipfile.ZipFile(bundle) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(members: Members, path: Path, listed: Mapping[str, Any] | None = None) -> Path:
    """Write a bundle of these members; its bundle.json is brought up to date, but for the fields of `listed`."""
    contents = json.loads(members["bundle.json"])
    if isinstance(contents, dict) and "members" in contents:
        contents["members"] = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in members.items()
            if name != "bundle.json"
        }
        contents["counts"] = count_members(members).model_dump()
        contents |= listed or {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, json.dumps(contents) if name == "bundle.json" else content)
    return path
