"""Notes on a fit, and the base class of findings."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value that is validated once and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Note:
    """A remark for readers; `code` is stable, `text` is one sentence."""

    code: str
    text: str
