"""Log-mel frames of streamed audio, and their inversion by Griffin-Lim.

Frame t is centred on sample (t + 1/2) hop, and a signal of n samples has ceil(n / hop) frames, so that clips cut at
whole frames line up with the tokens. Frames are computed in groups of a fixed number, whatever the sizes of the
blocks: a stream and a whole array give the same bits.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from ssmttm.files import Frozen

Array = npt.NDArray[np.float32]

_GROUP = 1024  # frames computed at once: 4 MB of windows at n_fft 1024
_FLOOR = 1e-6  # power; 60 dB below a full-scale sine, below which a band counts as silent
_F_MIN = 40.0  # Hz


class LogMel(Frozen):
    """Log-mel analysis and synthesis; mel scale 2595 log10(1 + f / 700) (O'Shaughnessy 1987)."""

    sample_rate: int = Field(gt=0, le=1_000_000)
    frame_rate: int = Field(gt=0)
    bands: int = Field(gt=0, le=4096)

    @model_validator(mode="after")
    def _whole_hop(self) -> "LogMel":
        if self.sample_rate % self.frame_rate:
            raise ValueError(
                f"sample_rate {self.sample_rate} is not a multiple of frame_rate {self.frame_rate}"
            )
        return self

    @property
    def hop(self) -> int:
        """Samples between frames."""
        return self.sample_rate // self.frame_rate

    @property
    def n_fft(self) -> int:
        """Samples of a window: the power of two at or above three hops (64 ms at 16 kHz and 50 Hz)."""
        return 1 << (3 * self.hop - 1).bit_length()

    def __call__(self, audio: Array) -> Array:
        """Return log-mel frames (frames, bands) of mono audio (samples,): the natural log of power."""
        parts = list(self.stream([audio]))
        return np.concatenate(parts) if parts else np.zeros((0, self.bands), np.float32)

    def stream(self, blocks: Iterable[Array]) -> Iterator[Array]:
        """Yield log-mel frames (some, bands) of mono audio that comes in blocks (samples,)."""
        lead = (self.n_fft - self.hop) // 2
        buffer = np.zeros(lead, np.float32)
        group = _GROUP * self.hop
        need = group - self.hop + self.n_fft
        total = done = 0
        for block in blocks:
            total += len(block)
            buffer = np.concatenate([buffer, block.astype(np.float32, copy=False)])
            while len(buffer) >= need:
                yield self._analyse(buffer[:need])
                buffer = buffer[group:]
                done += _GROUP
        rest = -(-total // self.hop) - done
        while rest > 0:
            count = min(rest, _GROUP)
            span = (count - 1) * self.hop + self.n_fft
            yield self._analyse(np.pad(buffer[:span], (0, max(0, span - len(buffer)))))
            buffer = buffer[count * self.hop :]
            rest -= count

    def invert(self, log_mel: Array) -> Array:
        """Return audio (frames x hop,) whose log-mel is near `log_mel` (frames, bands).

        Fast Griffin-Lim (Perraudin, Balazs and Sondergaard 2013, eq. 13, momentum 0.99), from zero phase, so that
        the result is the same every time.
        """
        from scipy.fft import irfft, rfft

        target = np.sqrt(self._linear_power(np.exp(log_mel.astype(np.float32)) - np.float32(_FLOOR)))
        phase = np.ones_like(target, dtype=np.complex64)
        previous = np.zeros_like(phase)
        audio = self._overlap_add(irfft(target * phase, n=self.n_fft, axis=1).astype(np.float32))
        for _ in range(32):
            rebuilt = rfft(self._windows(audio) * self._window, axis=1)
            moved = rebuilt + np.float32(0.99) * (rebuilt - previous)
            phase = (moved / np.maximum(np.abs(moved), 1e-9)).astype(np.complex64)
            previous = rebuilt
            audio = self._overlap_add(irfft(target * phase, n=self.n_fft, axis=1).astype(np.float32))
        lead = (self.n_fft - self.hop) // 2
        clipped: Array = np.clip(audio[lead : lead + len(log_mel) * self.hop], -1.0, 1.0)
        return clipped

    @cached_property
    def _window(self) -> Array:
        # A Hann window, scaled so that a full-scale sine has magnitude 1/2 for every n_fft.
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.n_fft) / self.n_fft)
        window: Array = (hann / hann.sum()).astype(np.float32)
        return window

    @cached_property
    def _filters(self) -> Array:
        """Triangles (bins, bands) equally spaced in mel."""
        mels = np.linspace(_mel(_F_MIN), _mel(self.sample_rate / 2), self.bands + 2)
        edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)  # Hz
        bins = np.arange(self.n_fft // 2 + 1) * self.sample_rate / self.n_fft
        rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
        return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)

    def _linear_power(self, mel_power: Array) -> Array:
        """Return non-negative power (frames, bins) whose mel powers are near the given ones (frames, bands).

        Multiplicative updates for the Kullback-Leibler divergence (Lee and Seung 2001, eq. 5).
        """
        wanted = np.maximum(mel_power, np.float32(1e-9))
        weight = np.maximum(self._filters.sum(axis=1), np.float32(1e-9))
        power: Array = wanted @ self._filters.T + np.float32(1e-12)
        for _ in range(40):
            power *= (wanted / (power @ self._filters)) @ self._filters.T / weight
            power += np.float32(1e-20)
        return power

    def _windows(self, padded: Array) -> Array:
        return np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop]

    def _analyse(self, padded: Array) -> Array:
        from scipy.fft import rfft

        spectrum = rfft(self._windows(padded) * self._window, axis=1)  # (frames, bins)
        power = spectrum.real**2 + spectrum.imag**2
        log_mel: Array = np.log(power @ self._filters + np.float32(_FLOOR))
        return log_mel

    def _overlap_add(self, frames: Array) -> Array:
        """Return the least-squares signal of windowed frames (Griffin and Lim 1984, eq. 6)."""
        length = (len(frames) - 1) * self.hop + self.n_fft
        audio = np.zeros(length, np.float32)
        weight = np.full(length, 1e-10, np.float32)
        square = self._window**2
        for index, frame in enumerate(frames):
            start = index * self.hop
            audio[start : start + self.n_fft] += frame * self._window
            weight[start : start + self.n_fft] += square
        return audio / weight


def _mel(hz: float) -> float:
    return float(2595.0 * np.log10(1.0 + hz / 700.0))
