"""A remark for readers, as the stages of the analysis leave it with their results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """A remark for readers; `code` is stable, `text` is one sentence."""

    code: str
    text: str
