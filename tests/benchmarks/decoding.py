"""Reading sound files, against libsndfile as versions before FFmpeg read them: speed, and memory of a long file.

Both sides give mono blocks at 16 kHz. The corpora of a folder of WAV and FLAC files are built by both, and their
fingerprints are compared. The length of a file costs no memory: two hours are read in a process of their own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import soundfile
from numpy.typing import NDArray

from ssmttm.corpus import folder
from ssmttm.corpus.audio import stream_audio
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.spec import BuildSpec
from tests.benchmarks.measure import Row, as_ratio, by_turns, times
from tests.sounds import music
from tests.ssmttm.corpus.test_corpus_audio import by_soundfile

RATE = 16000
ENDINGS = ("wav", "flac", "ogg", "mp3")
READ = """
import re, sys
from pathlib import Path
from ssmttm.corpus.audio import stream_audio
sum(map(len, stream_audio(Path(sys.argv[1]), 16000)))
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""
"""Read a file block by block; print the peak memory in MiB."""


def run(*, quick: bool) -> Iterator[Row]:
    """Yield a row for each format, for a build, and for the memory of a long file."""
    minutes, rounds = (1, 3) if quick else (4, 9)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for ending in ENDINGS:
            for channels in (1, 2):
                path = _write(root / f"{channels}.{ending}", minutes, channels)
                _check_equal(path, exact=ending in {"wav", "flac"})
                ours, baseline = by_turns(rounds, partial(_ours, path), partial(by_soundfile, path, RATE))
                what = f"decoding: {minutes} min {ending}, {'stereo' if channels == 2 else 'mono'}, to {RATE:,} Hz"
                yield times(what, ours, baseline)
        yield _build(root, rounds=2 if quick else 5)
        yield _memory(root, "mp3", hours=0.2 if quick else 2)
        yield _memory(root, "wav", hours=0.2 if quick else 2)


def _write(path: Path, minutes: float, channels: int) -> Path:
    """Write 44,100 samples a second: ten seconds, again and again."""
    sound = np.ascontiguousarray(music(10, 44100, channels).T)
    with soundfile.SoundFile(path, "w", 44100, channels) as file:
        for _ in range(round(minutes * 6)):
            for start in range(0, len(sound), 4410):
                file.write(sound[start : start + 4410])
    return path


def _ours(path: Path) -> NDArray[np.float32]:
    return np.concatenate(list(stream_audio(path, RATE)))


def _check_equal(path: Path, *, exact: bool) -> None:
    ours, baseline = _ours(path), by_soundfile(path, RATE)
    if len(ours) != len(baseline) or np.abs(ours - baseline).max() > (0 if exact else 3e-6):
        raise AssertionError(f"{path.name}: both sides give other sound")


def _build(root: Path, rounds: int) -> Row:
    music_folder = root / "music"
    music_folder.mkdir()
    for number in range(16):
        _write(music_folder / f"{number}.{ENDINGS[number % 2]}", 0.5, 2)
    lines = [f"{path.name},A tune.\n" for path in sorted(music_folder.iterdir())]
    (music_folder / "captions.csv").write_text("".join(["path,caption\n", *lines]))
    spec = BuildSpec(source="folder", audio=music_folder, codebooks=1, codebook_size=16, segment_seconds=5.0)
    found: set[str] = set()

    def build() -> None:
        with tempfile.TemporaryDirectory(dir=root) as out:
            found.add(build_corpus(spec, Path(out) / "corpus", workers=1).fingerprint)

    def build_by_soundfile() -> None:
        with patch.object(folder, "stream_audio", lambda path, rate: iter([by_soundfile(path, rate)])):
            build()

    ours, baseline = by_turns(rounds, build, build_by_soundfile)
    if len(found) != 1:
        raise AssertionError("both sides build other corpora")
    return times("decoding: build of 16 files of 30 s, WAV and FLAC", ours, baseline)


def _memory(root: Path, ending: str, hours: float) -> Row:
    """Return the peak memory of reading a long file, and of reading one of a minute as the baseline."""
    mib = [_peak_mib(_write(root / f"long.{ending}", minutes, 2)) for minutes in (60 * hours, 1)]
    return Row(
        f"decoding: peak memory of {hours:g} h {ending}, against 1 min",
        *(f"{each:.0f} MiB" for each in mib),
        as_ratio(mib[1] / mib[0]),
    )


def _peak_mib(path: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout)
