"""Sound files of any codec that the FFmpeg of PyAV writes, and tags as taggers add them."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Sound = NDArray[np.float32]


def music(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> Sound:
    """Return a chord that swells, with a little noise (channels, n); peak about 0.5."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    chord = sum(np.sin(2 * np.pi * pitch * time) for pitch in rng.uniform(100, min(2000, 0.3 * rate), 5))
    loud = 0.08 + 0.04 * np.sin(2 * np.pi * 0.7 * time)
    parts = [chord * loud * (1 - 0.2 * n) + 0.01 * rng.standard_normal(len(time)) for n in range(channels)]
    return np.stack(parts).astype(np.float32)


def encode(
    path: Path,
    codec: str,
    sound: Sound,
    rate: int,
    *,
    bit_rate: int = 0,
    muxer: str | None = None,
    muxed: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write sound (channels, n) and return the path; `muxed` are options of the container, the others of the codec."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(sound)]
    with av.open(str(path), "w", format=muxer, options=muxed or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        stream.options = options
        if bit_rate:
            stream.bit_rate = bit_rate
        stream.codec_context.open(strict=False)
        whole = av.AudioFrame.from_ndarray(sound, format="fltp", layout=layout)
        whole.rate, whole.pts, whole.time_base = rate, 0, Fraction(1, rate)
        size = stream.codec_context.frame_size or 4096
        resampler = av.AudioResampler(stream.format.name, layout, rate, frame_size=size)
        for frame in [*resampler.resample(whole), *resampler.resample(None), None]:
            container.mux(stream.encode(frame))
    return path


def mp3(path: Path, sound: Sound, rate: int, *, header: bool = True, **options: Any) -> bytes:
    """Write an MP3 and return its bytes; without a header it says nothing of its length."""
    muxed = {} if header else {"write_xing": "0", "id3v2_version": "0"}
    return encode(path, "libmp3lame", sound, rate, muxed=muxed, **options).read_bytes()


def id3v1() -> bytes:
    """Return the tag of 128 bytes that stands at the end of old MP3 files."""
    return b"TAG" + b"a title".ljust(125)


def id3v2(content: bytes, padding: int = 0) -> bytes:
    """Return a tag for the front of a file; padding: zeros that its size leaves out."""
    size = bytes(len(content) >> bits & 127 for bits in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + content + bytes(padding)


def ape(*, header: bool) -> bytes:
    """Return an APE tag of version 2, or of version 1, which has no header."""
    items = struct.pack("<II", 5, 0) + b"Title\0chord"
    of = [0xA0000000, 0x80000000] if header else [0, 0]
    ends = [b"APETAGEX" + struct.pack("<IIII8x", 1000, len(items) + 32, 1, flags) for flags in of]
    return (ends[0] if header else b"") + items + ends[1]
