"""A trained study for the tests of its evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.record.root import Root


@pytest.fixture
def trained(there: Path, here: Root, empty_store: Path) -> Root:
    """A copy of a ROOT with two trained runs of the study `tiny`, and an empty MLflow store."""
    shutil.copytree(there, here.path)
    shutil.copyfile(empty_store, here.path / "mlflow.db")
    return here
