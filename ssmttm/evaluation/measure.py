"""The protocol of a measure of audio, and the preparation of clips for it.

A measure turns clips into small arrays with a row for each clip, and later compares the rows of generated clips with
those of reference clips. Rows are kept on disk, so that a set is never in memory as audio and no clip is judged twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ssmttm.codec.base import Audio

Arrays = Mapping[str, npt.NDArray[np.generic]]
"""Arrays (clips, ...) by name."""


@dataclass(frozen=True)
class Scores:
    """The result of a comparison."""

    values: Mapping[str, float]
    """Values by the metric's name, which ends in the first digits of the measure's fingerprint."""
    notes: Sequence[str] = field(default=())
    """Limits of their meaning, a sentence each."""


class Measure(Protocol):
    """Clips to arrays, arrays to scores."""

    @property
    def key(self) -> str:
        """Name and first digits of the fingerprint, which identify the arrays."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of its scores."""

    def rows(self, clips: Sequence[Audio], sample_rate: int) -> Arrays:
        """Return the rows it keeps of mono clips, each (samples,) in [-1, 1]."""

    def score(self, generated: Arrays, reference: Arrays, captions: Sequence[str]) -> Scores:
        """Compare generated clips, one for each caption, with the reference."""


def resampled(clip: Audio, rate: int, wanted: int) -> Audio:
    """Return mono audio (samples,) at the sample rate `wanted`."""
    if rate == wanted:
        return clip
    import soxr

    return np.asarray(soxr.resample(clip, rate, wanted), dtype=np.float32)


def windows(clip: Audio, length: int) -> list[Audio]:
    """Return a clip in windows of `length` samples that overlap by half; the last one may be shorter, down to half.

    As stable-audio-metrics cuts clips: windows of 10 s every 5 s.
    """
    step = max(1, length // 2)
    return [clip[start : start + length] for start in range(0, max(step, len(clip) - step), step)]
