"""Read sound files as mono blocks at one sample rate, a few seconds at a time so that length costs no memory.

FFmpeg decodes (by PyAV). What it passes over in silence is found here: sound that is lost at the end or in the middle,
and content that is no music. The one who asks gets all of a file or the reason why not.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from ssmttm.corpus.mp3 import mp3_frames
from ssmttm.corpus.promised import is_wav, promise
from ssmttm.corpus.source import Array, SkipTrackError
from ssmttm.corpus.verdict import Verdict

if TYPE_CHECKING:
    from av.audio.codeccontext import AudioCodecContext
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

FIRST_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
"""Endings that versions without FFmpeg read: the listing of their corpora has no others."""
SUFFIXES = (
    *FIRST_SUFFIXES,
    *(".opus", ".m4a", ".aac", ".mp4", ".aiff", ".aif", ".aifc", ".oga", ".webm", ".mka", ".au", ".mp2"),
)
_BLOCK_SECONDS = 10
_MAX_RATE, _MAX_CHANNELS = (
    1_000_000,
    64,
)  # of a header: larger ones are damage, and a block of them fills the memory
_WAV_PROBE = "32768"  # bytes: FFmpeg else searches 5 MB of every WAV for a codec in disguise, 20 ms a file
_FORMATS = "wav,flac,ogg,mp3,mov,aac,aiff,matroska,au"  # FFmpeg's names; a playlist could open other files
_BEGIN = 0.1  # seconds of a lossy stream in which a decoder may miss what was cut off before
_SCALE = {  # by FFmpeg's names: whole numbers become fractions of full scale, as in libsndfile
    name + planar: scale
    for name, scale in {"u8": 2**-7, "s16": 2**-15, "s32": 2**-31, "flt": 1.0, "dbl": 1.0}.items()
    for planar in ("", "p")
}


def stream_audio(path: Path, sample_rate: int, seconds: float | None = None) -> Iterator[Array]:
    """Yield blocks (samples,) of a file, mixed to mono and resampled.

    seconds: stop after that much sound, and judge no more than it. Raises SkipTrackError, at the end at the latest, if
    the file is unreadable or damaged, or holds no music.
    """
    import soxr

    verdict = Verdict()
    wanted = None if seconds is None else round(seconds * sample_rate)
    resample, of_rate, given = None, 0, 0
    for rate, channels in _blocks(path):
        mono = _mean(channels)
        verdict.add(channels, mono, rate)
        if rate != of_rate:  # the first block; in joined files any
            if resample is not None:
                yield resample.resample_chunk(np.zeros(0, np.float32), last=True)
            of_rate = rate
            resample = (
                None if rate == sample_rate else soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
            )
        block = mono if resample is None else resample.resample_chunk(mono)
        yield block
        given += len(block)
        if wanted is not None and given >= wanted:
            break
    else:
        if resample is not None:
            yield resample.resample_chunk(np.zeros(0, np.float32), last=True)
    verdict.check()


def _blocks(path: Path) -> Iterator[tuple[int, Array]]:
    """Yield the sample rate and blocks (channels, n) of a file, of equal length but where its form changes."""
    from av.audio.fifo import AudioFifo

    form = (0, 0, "")
    queue, count = AudioFifo(), 0  # joins frames of a few milliseconds without a call of NumPy for each
    for frame in _frames(path):
        new = (frame.rate, frame.layout.nb_channels, frame.format.name)
        if new != form:
            if count:
                yield form[0], _as_float(queue.read(count))
            if frame.format.name not in _SCALE:
                raise SkipTrackError(f"unreadable audio: its samples are of the kind {frame.format.name}")
            form, queue, count = new, AudioFifo(), 0
        frame.pts = None  # else the queue compares the clock
        queue.write(frame)
        count += frame.samples
        while count >= (length := _BLOCK_SECONDS * frame.rate):
            yield frame.rate, _as_float(queue.read(length))
            count -= length
    if count:
        yield form[0], _as_float(queue.read(count))


def _frames(path: Path) -> Iterator["AudioFrame"]:
    """Yield what FFmpeg decodes of a file; raises SkipTrackError if that is not all of it."""
    import av
    from av.audio.stream import AudioStream

    try:
        options = {"format_whitelist": _FORMATS} | ({"probesize": _WAV_PROBE} if is_wav(path) else {})
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
            stream = container.streams.best("audio")
            if not isinstance(stream, AudioStream):
                raise SkipTrackError("unreadable audio: the file holds no sound")
            if stream.codec_context is None:
                raise SkipTrackError("unreadable audio: FFmpeg has no decoder for it")
            if not (0 < stream.rate <= _MAX_RATE and 0 < stream.channels <= _MAX_CHANNELS):
                raise SkipTrackError(
                    f"unreadable audio: its header says {stream.rate:,} Hz and {stream.channels} channels"
                )
            if container.format.name != "mp3":
                yield from _decoded(path, container, stream)
                return
        with path.open("rb") as file:
            yield from _decoded_mp3(file)
    except (av.error.FFmpegError, OSError) as error:
        raise SkipTrackError(f"unreadable audio: {_why(path, error)}") from error


def _decoded(path: Path, container: "InputContainer", stream: "AudioStream") -> Iterator["AudioFrame"]:
    """Yield the sound of one stream of a container."""
    import av

    promised = promise(path, container, stream)
    context = stream.codec_context
    context.thread_count = 1  # the build has a process for each core
    if promised.lossless:
        context.options = {"err_detect": "crccheck+explode"}
    tick = float(stream.time_base or 0)
    seconds, end = 0.0, None  # of sound so far; where the last packet ends by the container's clock
    failed: Exception | None = None
    try:
        for packet in container.demux(stream):
            begun = promised.lossless or seconds > _BEGIN
            if packet.pts is not None:
                if begun and end is not None and packet.pts * tick > end + promised.gap:
                    lost = packet.pts * tick - end
                    raise SkipTrackError(f"damaged: {lost:.2f} s of sound are lost at {seconds:.2f} s")
                end = (packet.pts + (packet.duration or 0)) * tick
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                if begun and packet.pos is not None and packet.pos + packet.size >= container.size:
                    promised.check(seconds)
                    raise SkipTrackError(
                        f"damaged: its file ends in the middle of a frame, after {seconds:.2f} s"
                    ) from error
                if begun:
                    raise
                failed = error
                continue
            for frame in frames:
                seconds += frame.samples / frame.rate
                yield frame
    except av.error.FFmpegError as error:
        raise SkipTrackError(f"damaged: it cannot be decoded at {seconds:.2f} s") from error
    promised.check(seconds)
    if failed and not seconds:
        raise failed


def _decoded_mp3(file: BinaryIO) -> Iterator["AudioFrame"]:
    """Yield the sound of MPEG audio, without the delay and padding of its encoder."""
    import av

    context = cast("AudioCodecContext", av.CodecContext.create("mp3float", "r"))
    context.thread_count = 1
    for part in mp3_frames(file):
        try:
            frames = context.decode(av.Packet(part.data))
        except av.error.FFmpegError as error:
            if part.begins:
                continue
            raise SkipTrackError(f"damaged: it cannot be decoded at {part.seconds:.2f} s") from error
        for frame in frames:
            if part.stop - part.first == frame.samples:
                yield frame
            elif part.first < part.stop:
                yield _cut(frame, part.first, part.stop)


def _cut(frame: "AudioFrame", first: int, stop: int) -> "AudioFrame":
    """Return some samples of a frame whose channels are apart."""
    samples: Any = np.ascontiguousarray(frame.to_ndarray()[:, first:stop])
    cut = type(frame).from_ndarray(samples, format=frame.format.name, layout=frame.layout.name)
    cut.rate = frame.rate
    return cut


def _why(path: Path, error: Exception) -> str:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(8)[4:] == b"ftyp" and b"moov" not in file.read(2**20):
                return "the index of an MP4 file (moov) is missing, as where a download broke off"
    if getattr(error, "errno", None) == errno.EINVAL:
        return f"its content is in a format that is not read (read are {', '.join(_FORMATS.split(','))})"
    return str(getattr(error, "strerror", None) or error)


def _as_float(frame: "AudioFrame | None") -> Array:
    """Return the samples of a frame as float32 (channels, n), full scale 1."""
    assert frame is not None, "the queue holds what was counted"
    samples: npt.NDArray[Any] = frame.to_ndarray()  # (channels, n), or interleaved (1, n x channels)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    with np.errstate(over="ignore"):  # float64: infinity is found later
        found: Array = samples.astype(np.float32, copy=False)
    if samples.dtype == np.uint8:
        found -= np.float32(128)
    if samples.dtype.kind != "f":
        found *= np.float32(_SCALE[frame.format.name])
    return found


def _mean(channels: Array) -> Array:
    """Return the mean (n,) of channels (channels, n), to the bit as NumPy gives it for interleaved samples."""
    mean: Array = channels[0]
    if len(channels) == 1:
        return mean
    with np.errstate(invalid="ignore", over="ignore"):  # absurd values are found later
        if len(channels) == 2:
            mean = (channels[0] + channels[1]) / np.float32(2)
        else:
            mean = np.ascontiguousarray(channels.T).mean(axis=1, dtype=np.float32)
    return mean
