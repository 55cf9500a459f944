"""Folders of published tables and fits, and of tables with right answers: not part of this repository."""

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


@pytest.fixture(scope="session")
def cases() -> Path:
    """Folder of tables with right answers: SCALING_CASES_DIR, else ../shared/cases/analysis beside the repository."""
    root = Path(__file__).resolve().parents[2]
    path = Path(os.environ.get("SCALING_CASES_DIR", root / ".." / "shared" / "cases" / "analysis"))
    if not path.is_dir():
        pytest.skip(f"no tables at {path}: set SCALING_CASES_DIR to the folder that holds them")
    return path
