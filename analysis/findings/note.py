"""The base class of findings, and the notes beside them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from analysis.points.note import Note

__all__ = ["Frozen", "Note"]


class Frozen(BaseModel):
    """A value that is validated once and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
