"""Corpora of pretrained codecs: a clip's tokens are its audio's codes, and other weights make another corpus."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssmttm.codec.load import load_codec
from ssmttm.codec.neural import NeuralCodec
from ssmttm.corpus import tracks
from ssmttm.corpus.audio import stream_audio
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.corpus.manifest import load_manifest
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError
from tests.ssmttm.neural import HOP, RATE, noise, write_model


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four recordings of 2 to 3 s, two of them at another rate than the codecs'."""
    root = tmp_path_factory.mktemp("music")
    with (root / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "caption"])
        for number in range(4):
            rate = RATE * (1 + number % 2)
            audio = noise(1, int((2 + number / 3) * rate), seed=number)[0]
            soundfile.write(root / f"{number}.wav", audio, rate, subtype="FLOAT")
            rows.writerow([f"{number}.wav", f"Noise number {number}."])
    return root


@pytest.fixture
def spec_of(music: Path, models: dict[str, Path]):
    def make(kind: str, **changed: object) -> BuildSpec:
        fields = {"codebooks": 2, "segment_seconds": 0.75, "valid": 0.25, "codec_model": str(models[kind])}
        return BuildSpec.model_validate(
            {"source": "folder", "audio": music, "codec": kind, **fields, **changed}
        )

    return make


@pytest.fixture
def dac_corpus(spec_of, tmp_path: Path) -> Path:
    build_corpus(spec_of("dac"), tmp_path / "out", workers=1)
    return tmp_path / "out"


@pytest.mark.parametrize("kind", ["dac", "encodec"])
def test_a_clips_tokens_are_the_codes_of_its_audio(kind: str, spec_of, music: Path, tmp_path: Path) -> None:
    manifest = build_corpus(spec_of(kind), tmp_path / "out", workers=1)
    codec = load_codec(tmp_path / "out/codec")
    assert manifest.codec == codec.facts
    assert {Path(file).name for file in manifest.codec_files} == {
        "codec.json",
        "config.json",
        "model.safetensors",
    }
    assert (manifest.codec.name, manifest.codec.n_codebooks, manifest.frames) == (kind, 2, 150)
    partial = 0
    for split in ("train", "valid"):
        data = TokenDataset(tmp_path / "out", split)
        for index in range(len(data)):
            clip = data.clip(index)
            track = np.concatenate(list(stream_audio(music / clip.track, RATE)))
            start = round(clip.start_seconds * RATE)
            codes = codec.encode(track[start : start + 150 * HOP][None])[0]
            assert codes.shape[1] == clip.frames
            assert np.array_equal(data.codes([index])[0, :, : clip.frames], codes)
            partial += clip.frames < 150
    assert partial
    assert sum(facts.clips for facts in manifest.splits.values()) == 14


def test_bach_is_rendered_at_the_codecs_rate(models: dict[str, Path], tmp_path: Path) -> None:
    spec = BuildSpec(
        source="bach", limit=2, valid=0.5, codec="dac", codec_model=str(models["dac"]), codebooks=1
    )
    manifest = build_corpus(spec, tmp_path / "out", workers=1)
    assert manifest.codec.sample_rate == RATE
    assert manifest.frames == 2000
    assert sum(manifest.hours(split) for split in manifest.splits) > 1 / 120


def test_an_interrupted_build_continues_to_the_same_corpus(
    spec_of, dac_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_manifest(dac_corpus)
    encoded: list[int] = []
    real = NeuralCodec.encode

    def counting(self: NeuralCodec, audio: np.ndarray) -> np.ndarray:
        encoded.append(len(audio))
        if sum(encoded) > 7:
            raise KeyboardInterrupt
        return real(self, audio)

    monkeypatch.setattr(NeuralCodec, "encode", counting)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(spec_of("dac"), tmp_path / "cut", workers=1)
    finished = len(list((tmp_path / "cut").glob(".work/tracks/*.json")))
    assert 0 < finished < 4
    encoded.clear()
    with pytest.raises(InputError, match=r"unfinished build from another specification \(codec: "):
        build_corpus(spec_of("encodec"), tmp_path / "cut", workers=1)
    monkeypatch.setattr(NeuralCodec, "encode", real)
    assert build_corpus(spec_of("dac"), tmp_path / "cut", workers=1).fingerprint == whole.fingerprint


@pytest.mark.verify
def test_the_number_of_workers_makes_no_difference(spec_of, dac_corpus: Path, tmp_path: Path) -> None:
    two = build_corpus(spec_of("dac"), tmp_path / "two", workers=2)
    assert two.fingerprint == load_manifest(dac_corpus).fingerprint


def test_a_moved_model_gives_the_same_corpus_and_other_weights_do_not(
    spec_of, models: dict[str, Path], dac_corpus: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(models["dac"], tmp_path / "moved")
    assert build_corpus(spec_of("dac", codec_model=str(moved)), dac_corpus) == load_manifest(dac_corpus)
    other = write_model("dac", tmp_path / "other", seed=5)
    with pytest.raises(InputError, match=r"was built from another specification \(codec: "):
        build_corpus(spec_of("dac", codec_model=str(other)), dac_corpus)
    with pytest.raises(InputError, match=r"spec\.codebooks: 2 before, 3 now"):
        build_corpus(spec_of("dac", codebooks=3), dac_corpus)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"codebook_size": 64}, "codebook_size is for codec rvq; the model of codec dac has its own"),
        ({"sample_rate": 16000}, "sample_rate is for codec rvq"),
        ({"codec": "rvq"}, "codec_model is for codecs encodec and dac"),
        ({"codec": "opus"}, "'rvq', 'encodec' or 'dac'"),
    ],
)
def test_options_of_another_codec_are_refused(changed: dict[str, object], said: str, spec_of) -> None:
    with pytest.raises(ValueError, match=said):
        spec_of("dac", **changed)


def test_refused_builds_write_nothing(spec_of, tmp_path: Path) -> None:
    for spec, device, said in (
        (spec_of("dac", codebooks=12), "cpu", "codebooks is 12, but the dac model has 9"),
        (spec_of("dac", codec_model=str(tmp_path / "none")), "cpu", "neither a folder nor a model"),
        (spec_of("dac", segment_seconds=0.006), "cpu", "fewer than two frames of codec dac"),
        (spec_of("dac"), "tpu", "--device tpu: no such device here"),
        (spec_of("dac").model_copy(update={"codec": "rvq"}), "cuda", "codec rvq computes on the cpu"),
    ):
        with pytest.raises(InputError, match=said):
            build_corpus(spec, tmp_path / "out", workers=1, device=device)
    assert not (tmp_path / "out").exists()


def test_audio_is_cut_independently_of_its_blocks() -> None:
    signal = np.arange(1000, dtype=np.float32)
    for seed in range(5):
        cuts = np.sort(np.random.default_rng(seed).integers(0, 1000, 20))
        pieces = list(tracks._cut(np.split(signal, cuts), 150))
        assert [len(piece) for piece in pieces] == [150] * 6 + [100]
        assert np.array_equal(np.concatenate(pieces), signal)
