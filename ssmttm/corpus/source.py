"""What every source of music offers: tracks that can be listed cheaply and opened one by one.

Listing happens in the main process and must not decode anything; opening happens in a worker. A track travels to
its worker as a small record, never as audio.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, JsonValue

from ssmttm.corpus.manifest import Skipped

Array = npt.NDArray[np.float32]


class SkipTrackError(Exception):
    """A track cannot be used; the message is the reason the manifest gives."""


class TrackRef(BaseModel):
    """A track that could be in the corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    track: str
    """Its name, unique in the source and free of machine paths."""
    piece: str
    """What a limit counts: renderings of one score are one piece."""
    group: str
    """Tracks of one group (variants of one piece) are in the same split."""
    path: Path
    captions: tuple[str, ...] = ()
    title: str = ""
    licence: str = ""
    version: int = 0


class TrackFacts(BaseModel):
    """What is known of a track once it has been read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    licence: str
    captions: tuple[str, ...]
    """Ways to describe the track; its clips take them in turn."""
    placed: bool = False
    """Whether `{part}` in the captions stands for the clip's place: `the opening of`, `a passage from`."""
    content: str = ""
    """Equal for tracks that hold the same music; empty where that is not known."""


@dataclass(frozen=True)
class OpenTrack:
    """A track being read: facts, and mono audio in blocks (samples,) at the corpus's sample rate."""

    facts: TrackFacts
    blocks: Iterator[Array]


class Source(Protocol):
    """A source of music; picklable, since workers get a copy."""

    @property
    def name(self) -> str:
        """What the manifest calls it."""
        ...

    def tracks(self) -> tuple[list[TrackRef], list[Skipped]]:
        """All tracks by name, and those found but not usable; raises InputError when the source is wrong."""
        ...

    def identity(self) -> dict[str, JsonValue]:
        """What is found at the source, as far as it decides the content and is cheap to tell."""
        ...

    def made_with(self) -> dict[str, JsonValue]:
        """Versions of the libraries that turn it into audio."""
        ...

    def open(self, ref: TrackRef) -> OpenTrack:
        """Open one track; raises SkipTrackError when it cannot be used."""
        ...
