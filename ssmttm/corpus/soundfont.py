"""The SoundFont of the renderings, with the loops that break the format's rule repaired.

A SoundFont sample must go on for 8 points after the end of its loop (SoundFont 2.04, section 7.10), since a
synthesiser interpolates across it. Some samples of TimGM6mb (trumpets, strings) end with their loop; symusic then
reads whatever lies behind the sample in memory, and a rendering differs from run to run. Moving such a loop to begin
and end up to 8 points earlier leaves the sound as it was and makes it the same every time.
"""

import struct
from functools import lru_cache
from pathlib import Path

from ssmttm.corpus.packages import installed_folder
from ssmttm.errors import InputError

_RECORD = struct.Struct(
    "<20s5IBbHH"
)  # name, start, end, loop start, loop end, rate, pitch, cents, link, type
_GUARD = 8


def soundfont() -> Path:
    """TimGM6mb.sf2 (GPL-2.0), which pretty_midi's wheel carries."""
    return installed_folder("pretty_midi") / "TimGM6mb.sf2"


@lru_cache(maxsize=1)
def repaired_soundfont(path: Path) -> bytes:
    """The file's bytes with every loop at least 8 points before its sample's end."""
    data = bytearray(path.read_bytes())
    at = data.rfind(b"shdr")
    if data[:4] != b"RIFF" or at < 0:
        raise InputError(f"{path}: not a SoundFont")
    (size,) = struct.unpack_from("<I", data, at + 4)
    for offset in range(at + 8, at + 8 + size, _RECORD.size):
        name, start, end, loop, loop_end, *rest = _RECORD.unpack_from(data, offset)
        shift = min(_GUARD - (end - loop_end), loop - start)
        if shift > 0 and loop_end > loop:
            _RECORD.pack_into(data, offset, name, start, end, loop - shift, loop_end - shift, *rest)
    return bytes(data)
