"""Fixtures of bundles: a study of two runs, and a copy of the ROOT where they were trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.record.root import Root
from tests.studies import Fields, with_iterations


@pytest.fixture
def fields(study_fields: Fields) -> Fields:
    return with_iterations(study_fields, 5, 10)


@pytest.fixture
def copied(there: Path, tmp_path: Path) -> Root:
    shutil.copytree(there, tmp_path / "copied")
    return Root(tmp_path / "copied")
