"""The rvq codec on rendered Bach: decoded audio is near the original, and saved files are checked."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.format import write_array_header_1_0

from ssmttm import files
from ssmttm.codec.load import load_codec
from ssmttm.codec.mel import LogMel
from ssmttm.codec.rvq import RvqCodec, RvqConfig, entropy_bits
from ssmttm.corpus.bach import BachSource
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError

MEL = LogMel(sample_rate=16000, frame_rate=50, bands=64)


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    source = BachSource(BuildSpec(source="bach"))
    ref = next(ref for ref in source.tracks()[0] if ref.track == "bach/bwv269")
    return np.concatenate(list(source.open(ref).blocks))[: 16000 * 20]


@pytest.fixture(scope="module")
def codec(audio: np.ndarray) -> RvqCodec:
    return RvqCodec.fit(MEL(audio), RvqConfig(mel=MEL, n_codebooks=3, codebook_size=64, seed=0))


def test_decoded_audio_is_nearer_than_shuffled_codes(codec: RvqCodec, audio: np.ndarray) -> None:
    clip = audio[None, : 16000 * 4]
    codes = codec.encode(clip)
    decoded = codec.decode(codes)
    assert codes.dtype == np.uint16
    assert codes.shape == (1, 3, 200)
    assert decoded.shape == clip.shape
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    assert np.abs(decoded).max() > 0.1
    shuffled = codec.decode(codes[:, :, np.random.default_rng(0).permutation(200)])
    wanted = MEL(clip[0])
    near, far = (np.abs(MEL(signal[0]) - wanted).mean() for signal in (decoded, shuffled))
    assert near < 0.6 * far


def test_each_codebook_explains_more(codec: RvqCodec, audio: np.ndarray) -> None:
    explained = codec.report.variance_explained
    assert all(later > earlier for earlier, later in zip((0.0, *explained), explained, strict=False))
    assert explained[-1] > 0.85
    assert all(4.5 < bits <= 6 for bits in codec.report.entropy_bits)
    frames = MEL(audio)
    error = np.abs(codec.log_mel(codec.quantise(frames)) - frames).mean()
    assert error < 0.5 * np.abs(frames - frames.mean(axis=0)).mean()


def test_codes_are_the_nearest_entries(codec: RvqCodec, audio: np.ndarray) -> None:
    frames = MEL(audio)[:50]
    rows = (frames - codec.mean) / codec.deviation
    distances = np.square(rows[:, None] - codec.codebooks[0]).sum(axis=2)
    assert np.array_equal(codec.quantise(frames)[0], distances.argmin(axis=1))


def test_fitting_again_gives_the_same_codec(codec: RvqCodec, audio: np.ndarray) -> None:
    again = RvqCodec.fit(MEL(audio), codec.config)
    other = RvqCodec.fit(MEL(audio), codec.config.model_copy(update={"seed": 1}))
    assert again.fingerprint == codec.fingerprint != other.fingerprint


def test_a_saved_codec_is_the_same_codec(codec: RvqCodec, audio: np.ndarray, tmp_path: Path) -> None:
    codec.save(tmp_path)
    loaded = load_codec(tmp_path)
    assert loaded.facts == codec.facts
    assert np.array_equal(loaded.encode(audio[None]), codec.encode(audio[None]))
    assert json.loads((tmp_path / "codec.json").read_text())["report"]["entropy_bits"]


def test_a_damaged_codec_is_refused(codec: RvqCodec, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no codec here"):
        load_codec(tmp_path)
    codec.save(tmp_path)
    np.savez(tmp_path / "rvq.npz", mean=codec.mean, deviation=codec.deviation, codebooks=codec.codebooks + 1)
    with pytest.raises(InputError, match=r"rvq\.npz: does not match the fingerprint"):
        load_codec(tmp_path)
    np.savez(tmp_path / "rvq.npz", mean=codec.mean, deviation=codec.deviation, codebooks=codec.mean)
    with pytest.raises(
        InputError, match=r"rvq\.npz: codebooks holds float32 .*codec\.json says float32 \(3, 64, 64\)"
    ):
        load_codec(tmp_path)
    (tmp_path / "rvq.npz").unlink()
    with pytest.raises(InputError, match=r"rvq\.npz is missing"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text('{"name": "opus"}')
    with pytest.raises(InputError, match="known codecs: rvq"):
        load_codec(tmp_path)


@pytest.mark.parametrize(
    ("announced", "held", "said"),
    [
        (10**12, 4000, "mean.npy holds float32 .* and 4,000 bytes in place of 4,000,000,000,000"),
        (-1, 4000, "its header has the shape"),
        (2500, 10_000, "it would unpack to .* bytes, and at most 9,000 are read"),
    ],
    ids=["lie", "negative", "bomb"],
)
def test_arrays_are_not_unpacked_beyond_what_they_announce(
    codec: RvqCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, announced: int, held: int, said: str
) -> None:
    codec.save(tmp_path)
    header = io.BytesIO()
    write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (announced,)})
    with zipfile.ZipFile(tmp_path / "rvq.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mean.npy", header.getvalue() + bytes(held))
    monkeypatch.setattr(files, "MAX_ARRAY_BYTES", 9000)
    with pytest.raises(InputError, match=rf"rvq\.npz: not a whole file of arrays \(.*{said}"):
        load_codec(tmp_path)


def test_a_code_beyond_the_codebook_is_refused(codec: RvqCodec) -> None:
    with pytest.raises(InputError, match="code 64 of a codebook of 64"):
        codec.decode(np.full((1, 3, 4), 64, dtype=np.uint16))


def test_a_stream_gives_the_same_bits_as_the_whole(audio: np.ndarray) -> None:
    whole = np.concatenate([audio, audio])[: 16000 * 37 + 123]
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.integers(0, len(whole), 40))
    streamed = np.concatenate(list(MEL.stream(np.split(whole, cuts))))
    assert np.array_equal(streamed, MEL(whole))
    assert len(streamed) == -(-len(whole) // 320)


def test_frames_are_loud_at_the_time_of_a_tone() -> None:
    tone = np.zeros(16000, np.float32)
    tone[8000:9600] = np.sin(2 * np.pi * 1000 * np.arange(1600) / 16000)
    energy = MEL(tone).max(axis=1)
    loud = np.flatnonzero(energy > energy.max() - 1)
    assert abs(loud.mean() - (8800 / 320 - 0.5)) < 1
    assert np.array_equal(MEL(np.zeros(0, np.float32)), np.zeros((0, 64), np.float32))


def test_a_tone_comes_back_at_its_pitch() -> None:
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)).astype(np.float32)
    back = MEL.invert(MEL(tone))
    peak = np.abs(np.fft.rfft(back)).argmax() * 16000 / len(back)
    assert abs(peak - 440) < 16
    assert np.sqrt(np.square(back[8000:24000]).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


def test_entropy_is_that_of_the_distribution() -> None:
    assert entropy_bits(np.array([4, 4, 4, 4])) == 2.0
    assert entropy_bits(np.array([8, 0])) == 0.0
    assert entropy_bits(np.array([0, 0])) == 0.0
