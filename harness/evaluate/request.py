"""A request for scores, the corpus it concerns, and what became of a Run's evaluation: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.record.registry import ResolvedStudy
from harness.study.run import Count, Frozen


class CorpusOfRuns(Frozen):
    """The corpus that Runs were trained on."""

    path: Path
    fingerprint: str
    frames: Count
    """Frames of a clip, and so of a generated one."""
    where: str
    """The file that names it, for messages."""

    @classmethod
    def of(cls, resolved: ResolvedStudy) -> CorpusOfRuns:
        """Return the corpus of a study."""
        path, corpus = resolved.study.corpus.path.absolute(), resolved.corpus
        return cls(path=path, fingerprint=corpus.fingerprint, frames=corpus.frames, where=resolved.where)


@dataclass(frozen=True)
class Request:
    """Prompts, reference, sampling and models of an evaluation."""

    prompts: Path | None = None
    """Caption file; None takes the held-out captions."""
    reference: Path | None = None
    """Folder of recordings; None takes the held-out clips, decoded."""
    limit: int | None = None
    """Largest number of prompts."""
    temperature: float = 1.0
    top_k: int | None = 250
    guidance: float = 3.0
    seed: int = 0
    clap: str | None = None
    """Folder or hub name of a CLAP model."""
    tagger: str | None = None
    """Folder or hub name of an audio tagger."""
    device: str = "cpu"
    batch: int = 16
    """Prompts generated, decoded and measured at once."""


@dataclass(frozen=True)
class Evaluated:
    """One Run's evaluation."""

    run_id: str
    outcome: Literal[
        "evaluated", "kept", "shared", "busy", "impossible", "queued", "running", "failed", "new"
    ]
    """`kept` if all results existed, `shared` if other processes have prompts of the Run left, `busy` if another
    process evaluates it; `queued`, `running`, `failed` and `new` (not submitted) are states of its tasks."""
    reason: str | None = None
    """Reason of an evaluation that is not done."""
    notes: tuple[str, ...] = ()
    """Limits of its scores."""
