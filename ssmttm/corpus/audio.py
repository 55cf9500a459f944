"""Read sound files as mono blocks at one sample rate, a few seconds at a time so that length costs no memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssmttm.corpus.source import Array, SkipTrackError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_BLOCK_SECONDS = 10
_MAX_RATE, _MAX_CHANNELS = (
    1_000_000,
    64,
)  # of a header: larger ones are damage, and a block of them fills the memory


def stream_audio(path: Path, sample_rate: int) -> Iterator[Array]:
    """Yield blocks (samples,) of a file, mixed to mono and resampled; raises SkipTrackError if it is unreadable."""
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate > _MAX_RATE or file.channels > _MAX_CHANNELS:
                raise SkipTrackError(
                    f"unreadable audio: its header says {file.samplerate:,} Hz and {file.channels} channels"
                )
            resample = None
            if file.samplerate != sample_rate:
                resample = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32")
            while len(read := file.read(_BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)):
                mono = read.mean(axis=1, dtype=np.float32)
                if not np.isfinite(mono).all():
                    raise SkipTrackError("the audio holds values that are not numbers")
                yield mono if resample is None else resample.resample_chunk(mono)
            if resample is not None:
                yield resample.resample_chunk(np.zeros(0, np.float32), last=True)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
        raise SkipTrackError(f"unreadable audio: {reason}") from error
