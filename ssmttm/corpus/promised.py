"""Find the length that a sound file promises, and whether its end is there.

FFmpeg stops at a file's end without a word, and estimates a length from the bit rate where it has none; both hide a
download that broke off. Here a length is only what the file itself says. MP3 has its own reader (`mp3.py`).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ssmttm.corpus.source import SkipTrackError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

_UNKNOWN_FROM = 0x7FFFF000  # sizes of a WAV written to a pipe: 0, or near 2 or 4 GiB (sox, arecord, FFmpeg)
_HEADER_BYTES = 44  # by which careless programs promise too much: they count the header as sound
_LAST_PAGE = 2**17  # bytes: an Ogg page has at most 65,307
_LOSSLESS = ("pcm_", "flac", "alac", "wavpack")
_FRAMES = 2304  # samples that a lossy codec may add or drop at the ends: two frames of AAC or MP3
_PRE_SKIP = 0.08  # seconds that a decoder of Opus leaves out at the start, at most (RFC 7845, 4.2)
_ROUNDING = 0.002  # seconds: containers that count milliseconds


class Promise(NamedTuple):
    """The end that a file says it has."""

    seconds: float | None
    """Length, or None if it names none."""
    slack: float
    """Seconds that may be missing: frames at the ends of a lossy codec, rounding."""
    gap: float
    """Seconds by which the clock of a container may jump."""
    lossless: bool
    ended: bool = True
    """False if the file has no end where its format wants one."""

    def check(self, seconds: float) -> None:
        """Raise SkipTrackError if the sound that was read, in seconds, is shorter."""
        if not self.ended:
            raise SkipTrackError(f"damaged: its file is cut off after {seconds:.2f} s")
        if self.seconds is not None and seconds < self.seconds - self.slack:
            raise SkipTrackError(f"damaged: its file ends after {seconds:.2f} s of {self.seconds:.2f} s")


def promise(path: Path, container: "InputContainer", stream: "AudioStream") -> Promise:
    """Return the promise of an open file; raises SkipTrackError if it is known to be broken already."""
    name, codec = container.format.name, stream.codec_context
    rate = stream.rate or 1
    lossless = codec.name.startswith(_LOSSLESS)
    slack, gap = (0.0, 0.0) if lossless else (_FRAMES / rate, _FRAMES / 2 / rate)
    seconds: float | None = None
    ended = True
    if name == "wav":
        with path.open("rb") as file:
            _check_wav(file)
    elif name == "flac":
        facts = codec.extradata or b""  # STREAMINFO: 36 bits of samples at bit 108
        samples = int.from_bytes(facts[13:18], "big") & (2**36 - 1) if len(facts) >= 18 else 0
        seconds = samples / rate if samples else None
    elif name == "ogg":
        with path.open("rb") as file:
            granules, ended = _last_page(file)
        # Opus counts at 48 kHz, the samples that its decoder leaves out included.
        seconds = granules / (48000 if codec.name == "opus" else rate) if granules > 0 else None
        slack += _PRE_SKIP if codec.name == "opus" else 0
    elif name.startswith("matroska") and len(container.streams) == 1:  # else the length of the longest
        seconds = container.duration / 1e6 if container.duration else None
    elif name.startswith(("mov", "aiff", "au")) and stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    return Promise(seconds, slack + _ROUNDING, gap + _ROUNDING, lossless, ended)


def is_wav(path: Path) -> bool:
    """Return True if a file begins as WAV does."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] in {b"RIFF", b"RF64", b"BW64"} and head[8:] == b"WAVE"


def _check_wav(file: BinaryIO) -> None:
    """Raise SkipTrackError if the header of a WAV promises more sound than there is."""
    size = os.fstat(file.fileno()).st_size
    file.seek(12)
    bytes_a_second, wide = 0, 0
    while len(head := file.read(8)) == 8:
        name, length = head[:4], int.from_bytes(head[4:], "little")
        if name == b"data":
            there = size - file.tell()
            wanted = wide if length == 0xFFFFFFFF else length
            unknown = wanted == 0 or (_UNKNOWN_FROM <= wanted < 2**32 and wanted == length and there < wanted)
            spare = max(_HEADER_BYTES, round(_ROUNDING * bytes_a_second))
            if not unknown and there < wanted - spare:
                share = f"{100 * there / wanted:.0f} % of its sound"
                if bytes_a_second:
                    share = f"{there / bytes_a_second:.2f} s of {wanted / bytes_a_second:.2f} s"
                raise SkipTrackError(f"damaged: its file ends after {share}")
            file.seek(wanted + wanted % 2, os.SEEK_CUR)
            if not unknown and file.read(4) == b"RIFF":
                raise SkipTrackError("damaged: another WAV file is joined to its end, which no reader plays")
            return
        body = file.read(min(length, 64))
        if name == b"fmt ":
            bytes_a_second = int.from_bytes(body[8:12], "little")
        elif name == b"ds64":
            wide = int.from_bytes(body[8:16], "little")
        file.seek(length + length % 2 - len(body), os.SEEK_CUR)


def _last_page(file: BinaryIO) -> tuple[int, bool]:
    """Return the last granule position of an Ogg file (0 if none), and True if its stream ends there."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _LAST_PAGE))
    tail = file.read()
    at = tail.rfind(b"OggS\0")
    if at < 0 or len(tail) < at + 27:
        return 0, False
    lacing = tail[at + 27 : at + 27 + tail[at + 26]]
    whole = len(lacing) == tail[at + 26] and len(tail) >= at + 27 + len(lacing) + sum(lacing)
    granules = int.from_bytes(tail[at + 6 : at + 14], "little", signed=True)
    return granules, whole and bool(tail[at + 5] & 4)
