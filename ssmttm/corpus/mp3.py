"""Walk the frames of an MP3 file, so that its length and its damage are known to the frame.

FFmpeg's own reader of MP3 guesses: it takes the first header of joined files for all, pictures of tags for frames, and
passes over what is lost. A file is a chain of frames, each as long as its header says, with tags between them. A frame
named Xing, Info or VBRI begins a file and promises a number of frames; joined files have one each.
"""

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from ssmttm.corpus.source import SkipTrackError

_WINDOW = 2**20  # bytes read at once
_STRAY = 4  # bytes between two frames that are no damage: some encoders miscount their padding
_JUNK = 4096  # bytes behind the last frame that are no damage: a block of padding, a tag of an unknown kind
_DECODER_DELAY = 529  # samples by which every decoder of layer III is late (LAME's technical FAQ)
_BEGIN = 0.1  # seconds after a cut in which frames may need bytes of frames that are gone
_OFF_BY = 2  # frames: encoders count the frame that holds the number, or the last one, or do not

_SYNC = re.compile(rb"\xff[\xe2-\xff]|ID3[\x02-\x04]|APETAGEX|LYRICSBEGIN|TAG")
_KBITS = {  # bits a second by (MPEG-1, layer) and the header's index (ISO 11172-3, 2.4.2.3; ISO 13818-3, 2.4.2.3)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44100, 48000, 32000)  # of MPEG-1; half in MPEG-2, a quarter in MPEG-2.5


class Frame(NamedTuple):
    """One frame of sound."""

    data: bytes
    rate: int
    """Samples a second."""
    first: int
    """The first of its samples that belongs to the music: an encoder's padding comes before it."""
    stop: int
    """The sample after the last one that belongs to the music."""
    seconds: float
    """Beginning of the frame, in seconds of sound from the file's start."""
    begins: bool
    """True near the start of a file or of a joined part, where sound that was cut off before it may be missing."""


class _Header(NamedTuple):
    size: int
    samples: int
    rate: int
    layer: int
    version: int
    side: int
    """Bytes between the header and the name of a frame that begins a file."""

    def continues(self, before: "_Header | None") -> bool:
        """Return True if a frame may stand in one stream with another."""
        return before is not None and self[2:5] == before[2:5]


@lru_cache(maxsize=4096)
def _header(four: bytes) -> _Header | None:
    """Return the facts of a frame by its first four bytes, or None if they are no header."""
    if len(four) < 4 or four[0] != 0xFF or four[1] < 0xE0:
        return None
    version, layer = four[1] >> 3 & 3, 4 - (four[1] >> 1 & 3)  # version: 3 MPEG-1, 2 MPEG-2, 0 MPEG-2.5
    index, rate_index = four[2] >> 4, four[2] >> 2 & 3
    if version == 1 or layer == 4 or index in {0, 15} or rate_index == 3 or four[3] & 3 == 2:
        return None
    first = version == 3
    rate = _RATES[rate_index] // {3: 1, 2: 2, 0: 4}[version]
    bits = 1000 * _KBITS[first, layer][index - 1]
    padding = four[2] >> 1 & 1
    samples = 384 if layer == 1 else 1152 if layer == 2 or first else 576
    size = 4 * (12 * bits // rate + padding) if layer == 1 else samples // 8 * bits // rate + padding
    mono = four[3] >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return _Header(size, samples, rate, layer, version, 4 + side)


class _Part:
    """The frames since one that promised a number, or since the file's start."""

    def __init__(self, since: float, data: bytes = b"", header: _Header | None = None) -> None:
        self.since = since
        """Seconds of sound before it."""
        self.frames = self.promised = self.delay = self.padding = 0
        if header is None:
            return
        if data[36:40] == b"VBRI":
            self.promised = int.from_bytes(data[50:54], "big")
            return
        at = header.side + 8
        flags = int.from_bytes(data[at - 4 : at], "big")
        if flags & 1:
            self.promised = int.from_bytes(data[at : at + 4], "big")
        at += 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
        if len(data) >= at + 24 and data[at : at + 4].isalnum():  # the encoder names itself: LAME, Lavf, Lavc
            both = int.from_bytes(data[at + 21 : at + 24], "big")
            self.delay = (both >> 12) + _DECODER_DELAY
            self.padding = max(0, (both & 4095) - _DECODER_DELAY)

    def kept(self, samples: int) -> tuple[int, int]:
        """Return the first sample of the next frame that is not the encoder's delay, and the first of its padding."""
        begin = self.frames * samples
        if (
            begin >= self.delay
            and not self.promised * samples - self.padding - samples < begin < self.promised * samples
        ):
            return 0, samples
        first = min(samples, max(0, self.delay - begin))
        stop = samples
        if self.frames < self.promised:
            stop = max(first, min(samples, self.promised * samples - self.padding - begin))
        return first, stop

    def check_whole(self, last: _Header | None, seconds: float) -> None:
        """Raise SkipTrackError if there were fewer frames than promised."""
        if last and self.frames < self.promised - _OFF_BY:
            promised = self.since + (self.promised * last.samples - self.delay - self.padding) / last.rate
            raise SkipTrackError(f"damaged: its file ends after {seconds:.2f} s of {promised:.2f} s")


def mp3_frames(file: BinaryIO) -> Iterator[Frame]:
    """Yield the frames of an MP3 file (MPEG audio of any layer); raises SkipTrackError where sound is lost."""
    view = _View(file)
    seconds = fresh = 0.0  # fresh: seconds at which the file, a part or a tag ended before
    part = _Part(0.0)
    last: _Header | None = None
    position = _sync(view, 0)  # what is before the first frame or tag is no sound
    while position < view.size:
        header = _header(view.at(position, 4))
        if header is None or not (header.continues(last) or _confirmed(view, position, header)):
            after = _tag_end(view, position)
            if after is None:
                after = _sync(view, position + 1)
                _check_loss(view, position, after, seconds, promised=part.promised, begun=last is not None)
            fresh, position = seconds, after
            continue
        data = view.at(position, header.size)
        if len(data) < header.size - 1:  # one byte of padding may be missing
            if not part.promised:
                raise SkipTrackError(
                    f"damaged: its file ends in the middle of a frame, after {seconds:.2f} s"
                )
            break
        if data[header.side : header.side + 4] in {b"Xing", b"Info"} or data[36:40] == b"VBRI":
            part.check_whole(last, seconds)
            part, fresh = _Part(seconds, data, header), seconds
        else:
            first, stop = part.kept(header.samples)
            yield Frame(data, header.rate, first, stop, seconds, begins=seconds - fresh < _BEGIN)
            part.frames += 1
            seconds += (stop - first) / header.rate
        position, last = position + len(data), header
    if last is None:
        raise SkipTrackError("unreadable audio: it holds no frame of MPEG audio")
    part.check_whole(last, seconds)


def _check_loss(view: "_View", start: int, stop: int, seconds: float, *, promised: int, begun: bool) -> None:
    """Raise SkipTrackError if bytes that belong to no frame and no tag may have been sound."""
    lost = stop - start
    if stop < view.size:
        if begun and lost > _STRAY and _ape_start(view, stop) != start:
            raise SkipTrackError(f"damaged: the {lost:,} bytes at {seconds:.2f} s hold no sound")
    elif not promised and lost > _JUNK:
        raise SkipTrackError(f"damaged: the last {lost:,} bytes, after {seconds:.2f} s, hold no sound")


def _confirmed(view: "_View", position: int, header: _Header) -> bool:
    """Return True if another frame, a tag or the file's end follows a frame that may be chance."""
    after = position + header.size
    following = _header(view.at(after, 4))
    return (
        bool(following and following.continues(header))
        or after == view.size
        or _tag_end(view, after) is not None
    )


def _sync(view: "_View", start: int) -> int:
    """Return where the next frame or tag begins, or the file's size."""
    while start < view.size:
        part = view.at(start, _WINDOW)
        for match in _SYNC.finditer(part):
            position = start + match.start()
            header = _header(view.at(position, 4))
            if _confirmed(view, position, header) if header else _tag_end(view, position) is not None:
                return position
        start += max(1, len(part) - 16)  # a name may lie on the border
        if len(part) < _WINDOW:
            break
    return view.size


def _tag_end(view: "_View", start: int) -> int | None:
    """Return where a tag ends, or None if none begins there."""
    head = view.at(start, 32)
    if head[:3] == b"ID3" and len(head) > 10 and max(head[6:10]) < 128:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        end = start + 10 + size + (10 if head[5] & 16 else 0)
        while (rest := view.at(end, _JUNK)) and not rest.lstrip(b"\0"):  # padding that its size leaves out
            end += len(rest)
        return end + len(rest) - len(rest.lstrip(b"\0"))
    if head[:8] == b"APETAGEX" and len(head) == 32:
        begins = int.from_bytes(head[20:24], "little") & 2**29  # else the items are before it
        return start + 32 + (int.from_bytes(head[12:16], "little") if begins else 0)
    if head[:11] == b"LYRICSBEGIN":
        text = view.at(start, _WINDOW)
        ends = [found + 9 for name in (b"LYRICS200", b"LYRICSEND") if (found := text.find(name)) > 0]
        return start + min(ends) if ends else None
    if head[:3] == b"TAG":
        return start + (227 if head[3:4] == b"+" else 128)
    return None


def _ape_start(view: "_View", footer: int) -> int | None:
    """Return where an APE tag without a header begins, by its footer."""
    head = view.at(footer, 32)
    return footer + 32 - int.from_bytes(head[12:16], "little") if head[:8] == b"APETAGEX" else None


class _View:
    """A file's bytes by position, of which it holds one window."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self._start, self._data = 0, b""

    def at(self, position: int, size: int) -> bytes:
        """Return `size` bytes from a position on, fewer at the file's end."""
        begin = position - self._start
        if begin < 0 or begin + size > len(self._data):
            self._file.seek(position)
            self._start, self._data, begin = position, self._file.read(max(size, _WINDOW)), 0
        return self._data[begin : begin + size]
