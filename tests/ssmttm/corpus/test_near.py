"""Recordings that sound alike are found whatever their encoding, level, cut and start; other pieces are not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssmttm.corpus.bach import BachSource, _parsed, _parts
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.near import Fingerprint, near_pairs
from ssmttm.corpus.render import render
from ssmttm.corpus.spec import BuildSpec
from tests.ssmttm.corpus.test_corpus_folder import spec_for
from tests.ssmttm.corpus.test_splits import sides, tracks_in

# Nine harmonisations: three of `Herzliebster Jesu`, three of `Was mein Gott will`, three of other chorales.
CHORALES = ("244.3", "244.46", "245.3", "103.6", "244.25", "144.6", "269", "10.7", "101.7")
RATE = 16000


def rendered(number: str) -> np.ndarray:
    path = next(
        ref.path
        for ref in BachSource(BuildSpec(source="bach")).tracks()[0]
        if ref.path.stem == f"bwv{number}"
    )
    return render(_parts(_parsed(path)), [(0.0, 90.0)], 0, RATE)


@pytest.fixture(scope="module")
def chorales() -> dict[str, np.ndarray]:
    return {number: rendered(number) for number in CHORALES}


def as_mp3(audio: np.ndarray, kilobits: int = 64) -> bytes:
    import av

    written = io.BytesIO()
    with av.open(written, "w", format="mp3") as container:
        stream = container.add_stream("mp3", rate=RATE, layout="mono")
        stream.bit_rate = 1000 * kilobits
        frame = av.AudioFrame.from_ndarray(audio[None].astype(np.float32), format="fltp", layout="mono")
        frame.rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return written.getvalue()


def encoded(audio: np.ndarray, kilobits: int = 64) -> np.ndarray:
    return soundfile.read(io.BytesIO(as_mp3(audio, kilobits)), dtype="float32")[0]


def chroma(audio: np.ndarray) -> np.ndarray:
    fingerprint = Fingerprint(RATE)
    for start in range(0, len(audio), 50_000):
        fingerprint.add(audio[start : start + 50_000].astype(np.float32))
    return fingerprint.chroma()


def pairs(*audio: np.ndarray) -> list[tuple[int, int]]:
    found = [chroma(one) for one in audio]
    return sorted(near_pairs(found.__getitem__, len(found)))


def test_copies_of_a_recording_are_found_whatever_became_of_it(chorales: dict[str, np.ndarray]) -> None:
    piece = chorales["269"]
    silence = np.zeros(int(3.07 * RATE), np.float32)
    for copy in (
        encoded(piece),
        0.05 * piece,
        np.concatenate([silence, encoded(piece, 32)]),
        piece[int(3.3 * RATE) :],
        encoded(piece[int(7.77 * RATE) : int(18.2 * RATE)]),
    ):
        assert pairs(piece, copy) == [(0, 1)]


def test_other_chorales_are_no_copies_not_even_of_one_melody(chorales: dict[str, np.ndarray]) -> None:
    assert pairs(*chorales.values()) == []


def test_silence_noise_and_drones_are_like_nothing() -> None:
    time = np.arange(20 * RATE) / RATE
    rng = np.random.default_rng(0)
    drones = [0.3 * np.sin(2 * np.pi * pitch * time) for pitch in (220, 220, 330)]
    noises = [rng.normal(0, 0.1, len(time)) for _ in range(2)]
    assert pairs(*drones, *noises, np.zeros(len(time)), np.zeros(len(time)), np.zeros(10), np.zeros(0)) == []


def test_near_duplicates_stay_in_one_split_and_all_are_used(
    chorales: dict[str, np.ndarray], tmp_path: Path
) -> None:
    music = tmp_path / "music"
    music.mkdir()
    for number in ("269", "10.7", "101.7", "144.6"):
        soundfile.write(music / f"{number}.wav", chorales[number], RATE)
    (music / "copy.mp3").write_bytes(as_mp3(chorales["269"]))
    names = sorted(path.name for path in music.iterdir())
    (music / "captions.csv").write_text("path,caption\n" + "".join(f"{name},x\n" for name in names))
    manifest = build_corpus(spec_for(music, near_duplicates=0.85, seed=1), tmp_path / "out", workers=1)
    found = tracks_in(tmp_path / "out")
    assert set().union(*found.values()) == set(names)
    assert len(sides(found, {"269.wav", "copy.mp3"})) == 1
    assert manifest.grouping is not None
    assert manifest.grouping.shared == {"near-duplicate": 1}
    assert (manifest.grouping.groups, manifest.grouping.largest_by) == (4, ("near-duplicate",))
