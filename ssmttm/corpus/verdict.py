"""Judge the content of a track while it streams by: silence, a constant, channels that cancel, absurd values.

Such tracks decode without an error and become clips that teach a model nothing, or stop a build with NaN.
"""

import numpy as np

from ssmttm.corpus.source import Array, SkipTrackError

_PIECE_SECONDS = 0.05  # in which the largest and the smallest sample are compared
_STILL = 1e-4  # -80 dBFS, three steps of 16-bit sound: dither stays below, quiet music does not
_STILL_SHARE = 0.02  # of a constant: a codec's noise is 40 dB below it
_RINGING = 3  # pieces: a codec rings for that long where a constant begins and ends
_CANCELLED = 0.01  # of the channels' power: a codec leaves 20 dB or more; 64 independent channels lose 18 dB
_ABSURD = 100.0  # times full scale, 40 dB above it: a mix may exceed full scale by some dB


class Verdict:
    """Sums over the blocks of one track."""

    def __init__(self) -> None:
        self._pieces = self._moving = self._loud = 0  # all; with a moving mean; with a moving channel
        self._mono_power = self._power = 0.0
        self._sum, self._samples = 0.0, 0

    def add(self, channels: Array, mono: Array, rate: int) -> None:
        """Take in one block, as channels (channels, n) and as their mean (n,); raises SkipTrackError if absurd."""
        if not len(mono):
            return
        low, high = float(channels.min()), float(channels.max())  # of NaN, both are NaN
        if not (np.isfinite(low) and np.isfinite(high)):
            raise SkipTrackError("absurd values: some are infinite or not numbers")
        if max(-low, high) > _ABSURD:
            raise SkipTrackError(f"absurd values: up to {max(-low, high):.3g}, where full scale is 1")
        self._sum += float(mono.sum())
        self._samples += len(mono)
        pieces, moving = _moving_pieces(mono, rate)
        self._pieces += pieces
        self._moving += moving
        if len(channels) > 1:
            self._mono_power += float(np.dot(mono, mono))
            self._power += float(sum(np.dot(channel, channel) for channel in channels)) / len(channels)
            if moving <= _RINGING:  # else the mean is heard, and the channels need not be
                self._loud += max(_moving_pieces(channel, rate)[1] for channel in channels)

    def check(self) -> None:
        """Raise SkipTrackError if what was taken in is no music."""
        ringing = min(_RINGING, self._pieces // 4)
        still = self._moving <= ringing
        if not self._samples:
            return
        if (still and self._loud > ringing) or self._mono_power < _CANCELLED * self._power:
            raise SkipTrackError("channels cancel: they are in antiphase, so that mono is silent")
        mean = self._sum / self._samples
        if still and abs(mean) > _STILL:
            raise SkipTrackError(f"constant: all samples are near {mean:.3g}")
        if still:
            raise SkipTrackError("silent: nothing is louder than -80 dBFS")


def _moving_pieces(signal: Array, rate: int) -> tuple[int, int]:
    """Return the number of pieces of a signal (n,), and of those that move by more than the noise of stillness."""
    length = min(len(signal), max(1, round(_PIECE_SECONDS * rate)))
    pieces = signal[: len(signal) // length * length].reshape(-1, length)
    high, low = pieces.max(axis=1), pieces.min(axis=1)
    return len(pieces), int(
        np.count_nonzero(high - low > np.maximum(2 * _STILL, _STILL_SHARE / 2 * abs(high + low)))
    )
