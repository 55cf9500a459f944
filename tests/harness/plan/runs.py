"""Runs that are planned and never trained."""

from __future__ import annotations

from harness.study.run import Run
from tests.studies import Fields

DEFAULTS: Fields = {
    "corpus": "0" * 64,
    "frames": 128,
    "batch": 8,
    "optimiser": {"lr": 1e-3},
    "iterations": 100,
}


def made_run(model: Fields, **fields: object) -> Run:
    """A Run of a model on a corpus that does not exist."""
    return Run.model_validate(DEFAULTS | {"model": model} | fields)
