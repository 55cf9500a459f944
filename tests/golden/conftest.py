"""Folder of published tables and fits, which are not part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of published points and fits: SCALING_GOLDEN_DIR, else ../shared/golden beside the repository."""
    root = Path(__file__).resolve().parents[2]
    path = Path(os.environ.get("SCALING_GOLDEN_DIR", root / ".." / "shared" / "golden"))
    if not path.is_dir():
        pytest.skip(f"no published tables at {path}: set SCALING_GOLDEN_DIR to the folder that holds them")
    return path
