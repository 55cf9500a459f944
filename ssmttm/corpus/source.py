"""The protocol of a source of music, and the tracks that it lists and opens.

The main process lists tracks and must not decode any; workers open them. A track travels to its worker as a small
record, never as audio.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from ssmttm.corpus.manifest import SetAside, Skipped
from ssmttm.files import Frozen

Array = npt.NDArray[np.float32]


class SkipTrackError(Exception):
    """A track cannot be used; the manifest gives the message as the reason."""


class TrackRef(Frozen):
    """A track that could be in the corpus."""

    track: str
    """Name of the track, unique in the source and free of machine paths."""
    piece: str
    """Unit of `limit`: all renderings of one score are one piece."""
    group: str
    """Tracks of one group (variants of one piece) are in the same split."""
    group_keys: tuple[str, ...] = ()
    """Facts as `kind:value` (groups.py) that the captions give; tracks that share one are in the same split."""
    split: str = ""
    """Split in which a published split has the track; empty if splits are drawn."""
    path: Path
    by_content: bool = False
    """True if the content of `path` identifies the track; otherwise the source's own version does."""
    captions: tuple[str, ...] = ()
    title: str = ""
    licence: str = ""


class TrackFacts(Frozen):
    """Facts of a track that has been read."""

    captions: tuple[str, ...]
    """Ways to describe the track; its clips take them in turn."""
    title: str
    licence: str
    placed: bool = False
    """True if `{part}` in the captions stands for the clip's place: `the opening of`, `a passage from`."""
    content: str = ""
    """Equal for tracks that hold the same music; of sound files, the hash of the decoded samples."""
    group_keys: tuple[str, ...] = ()
    """Facts as `kind:value` (groups.py) that the tags in the sound file give."""


@dataclass(frozen=True)
class OpenTrack:
    """An open track: facts, and mono audio in blocks (samples,) at the corpus's sample rate."""

    facts: TrackFacts
    blocks: Iterator[Array]


class Source(Protocol):
    """A source of music; picklable, since workers get a copy."""

    @property
    def name(self) -> str:
        """Name of the source in the manifest."""

    def tracks(self) -> tuple[list[TrackRef], list[Skipped]]:
        """Return all tracks by name, and the unusable ones; raises InputError if the source is wrong."""

    def set_aside(self) -> tuple[SetAside, ...]:
        """Return the rows of captions that could not be used, by reason."""

    def identity(self) -> dict[str, JsonValue]:
        """Return the facts of the source that decide the content and are cheap to find out."""

    def made_with(self) -> dict[str, JsonValue]:
        """Return the versions of the libraries that turn it into audio."""

    def open(self, ref: TrackRef) -> OpenTrack:
        """Open one track; raises SkipTrackError if it cannot be used."""
