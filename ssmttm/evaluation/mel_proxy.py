"""A proxy distance that needs no weights: Frechet on log-mel frames.

It compares the frequency of spectra, and neither melody, rhythm nor meaning: a model with a bad distance is bad, a
model with a good distance need not be good.
"""

import hashlib
from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np

from ssmttm.codec.base import Audio
from ssmttm.codec.mel import LogMel
from ssmttm.evaluation.frechet import Moments, frechet_distance
from ssmttm.evaluation.measure import Arrays, Scores, resampled
from ssmttm.files import canonical_json

FRAME_RATE = 50


class MelProxy:
    """Log-mel frames of 32 bands, 50 a second, at the codec's sample rate if it is a multiple of 50, else 16 kHz."""

    def __init__(self, sample_rate: int) -> None:
        rate = sample_rate if sample_rate % FRAME_RATE == 0 else 16000
        self.mel = LogMel(sample_rate=rate, frame_rate=FRAME_RATE, bands=32)
        digest = hashlib.sha256(canonical_json(self.mel.model_dump()).encode()).hexdigest()
        self.key = f"mel_proxy-{digest[:8]}"
        self.metrics = (f"fd_{self.key}",)

    def rows(self, clips: Sequence[Audio], sample_rate: int) -> Arrays:
        """Return each clip's number of frames, their mean (bands,) and scatter (bands, bands)."""
        each = [Moments.of(self.mel(resampled(clip, sample_rate, self.mel.sample_rate))) for clip in clips]
        return {
            "frames": np.array([one.n for one in each], dtype=np.int64),
            "mean": np.stack([one.mean for one in each]),
            "scatter": np.stack([one.scatter for one in each]).astype(np.float32),
        }

    def score(self, generated: Arrays, reference: Arrays, captions: Sequence[str]) -> Scores:  # noqa: ARG002
        """Return the distance between all frames of both sets."""
        return Scores({self.metrics[0]: frechet_distance(_together(generated), _together(reference))})


def _together(rows: Arrays) -> Moments:
    parts = zip(rows["frames"], rows["mean"], rows["scatter"], strict=True)
    return reduce(add, (Moments(int(n), mean, scatter.astype(np.float64)) for n, mean, scatter in parts))
