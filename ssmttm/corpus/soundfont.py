"""The SoundFont of the renderings, with loops repaired that break a rule of the format.

A SoundFont sample must continue for 8 points after the end of its loop (SoundFont 2.04, section 7.10), since a
synthesiser interpolates across it. Some samples of TimGM6mb (trumpets, strings) end with their loop; symusic then
reads the memory behind the sample, and renderings differ from run to run. Moving such a loop up to 8 points back
keeps the sound and makes it the same every time.
"""

import struct
from functools import lru_cache
from pathlib import Path

from ssmttm.corpus.packages import installed_folder
from ssmttm.errors import InputError

# Name, start, end, loop start, loop end, rate, pitch, cents, link, type.
_RECORD = struct.Struct("<20s5IBbHH")


def soundfont() -> Path:
    """Return the path of TimGM6mb.sf2 (GPL-2.0) in pretty_midi's wheel."""
    return installed_folder("pretty_midi") / "TimGM6mb.sf2"


@lru_cache(maxsize=1)
def repaired_soundfont(path: Path) -> bytes:
    """Return the file's bytes with every loop at least 8 points before its sample's end."""
    data = bytearray(path.read_bytes())
    at = data.rfind(b"shdr")
    if data[:4] != b"RIFF" or at < 0:
        raise InputError(f"{path}: not a SoundFont")
    (size,) = struct.unpack_from("<I", data, at + 4)
    for offset in range(at + 8, at + 8 + size, _RECORD.size):
        name, start, end, loop, loop_end, *rest = _RECORD.unpack_from(data, offset)
        shift = min(8 - (end - loop_end), loop - start)
        if shift > 0 and loop_end > loop:
            _RECORD.pack_into(data, offset, name, start, end, loop - shift, loop_end - shift, *rest)
    return bytes(data)
