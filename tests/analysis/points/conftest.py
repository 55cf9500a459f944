"""The folder of small tables with right answers, which are not part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cases() -> Path:
    """Folder of tables with known answers: SCALING_CASES_DIR, else ../shared/cases beside the repository."""
    root = Path(__file__).resolve().parents[3]
    path = Path(os.environ.get("SCALING_CASES_DIR", root / ".." / "shared" / "cases")) / "analysis"
    if not path.is_dir():
        pytest.skip(f"no tables at {path}: set SCALING_CASES_DIR to the folder that holds analysis/")
    return path
