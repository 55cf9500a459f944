"""What everything that judges audio offers, and what several of them do alike.

A measure turns clips into small arrays, a row a clip, and later compares the rows of generated clips with those of
reference clips. Rows are what is kept on disk, so that a set is never in memory as audio and nothing is judged twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ssmttm.codec.base import Audio

Arrays = Mapping[str, npt.NDArray[np.generic]]
"""By name: (clips, ...)."""


@dataclass(frozen=True)
class Scores:
    """What a comparison came to."""

    values: Mapping[str, float]
    """By the metric's name, which ends in the first digits of the measure's fingerprint."""
    notes: Sequence[str] = field(default=())
    """What limits their meaning, a sentence each."""


class Measure(Protocol):
    """Clips to arrays, arrays to scores."""

    @property
    def key(self) -> str:
        """Name and the first digits of the fingerprint: whose arrays these are."""
        ...

    def metrics(self, *, paired: bool) -> tuple[str, ...]:
        """The scores it can give; `paired` where reference clip i is what prompt i describes."""
        ...

    def rows(self, clips: Sequence[Audio], sample_rate: int) -> Arrays:
        """What it keeps of mono clips, each (samples,) in [-1, 1]."""
        ...

    def score(self, generated: Arrays, reference: Arrays, captions: Sequence[str], *, paired: bool) -> Scores:
        """Compare generated clips, one a caption, with the reference."""
        ...


def resampled(clip: Audio, rate: int, wanted: int) -> Audio:
    """Mono audio (samples,) at another sample rate."""
    if rate == wanted:
        return clip
    import soxr

    return np.asarray(soxr.resample(clip, rate, wanted), dtype=np.float32)


def windows(clip: Audio, length: int) -> list[Audio]:
    """A clip in windows of `length` samples that overlap by half; the last one may be shorter, down to half.

    As stable-audio-metrics cuts clips: windows of 10 s every 5 s.
    """
    step = max(1, length // 2)
    return [clip[start : start + length] for start in range(0, max(step, len(clip) - step), step)]
