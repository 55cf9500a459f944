"""Coded remarks on a fit, and the frozen model that all findings are."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value that is checked once and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Note(Frozen):
    """A coded remark; `code` is stable, `text` is one sentence."""

    code: str
    text: str
