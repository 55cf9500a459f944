"""Corpora by pretrained codecs: a clip's tokens are its audio's codes, and other weights are another corpus."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ssmttm.codec.load import load_codec
from ssmttm.codec.neural import NeuralCodec
from ssmttm.corpus import tracks
from ssmttm.corpus.audio import stream_audio
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.dataset import TokenDataset, batch_indices
from ssmttm.corpus.manifest import load_manifest, verify_corpus
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError
from ssmttm.model.architecture import Architecture
from ssmttm.model.loss import codebook_cross_entropy
from ssmttm.model.music_lm import MusicLM
from ssmttm.model.patterns import delay
from tests.ssmttm.neural import HOP, RATE, noise, write_model
from tests.ssmttm.small import small_config, text_for

KINDS = ("dac", "encodec")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(kind, folder / kind) for kind in KINDS}


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_clips_tokens_are_the_codes_of_its_audio(kind: str, spec_of, music: Path, tmp_path: Path) -> None:
    manifest = build_corpus(spec_of(kind), tmp_path / "out", workers=1)
    codec = load_codec(tmp_path / "out/codec")
    assert manifest.codec == codec.facts
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_from_such_a_corpus(kind: str, spec_of, tmp_path: Path) -> None:
    build_corpus(spec_of(kind), tmp_path / "out", workers=1)
    data = TokenDataset(tmp_path / "out", "train")
    config = small_config(Architecture.PREFIX_SIMBA, n_codebooks=2, codebook_size=64)
    torch.manual_seed(0)
    model = MusicLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        indices = batch_indices(len(data), 0, 0, 4)
        codes, lengths = torch.from_numpy(data.codes(indices)), torch.from_numpy(data.lengths(indices))
        inputs, targets = delay(codes, lengths, config.special)
        logits = model(inputs, text_for(config, data.captions(indices)))
        totals, counts = codebook_cross_entropy(logits, targets)
        loss = totals.sum() / counts.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(64), abs=0.3)
    assert losses[-1] < losses[0] - 0.1


def test_bach_is_rendered_at_the_codecs_rate(models: dict[str, Path], tmp_path: Path) -> None:
    spec = BuildSpec(
        source="bach", limit=2, valid=0.5, codec="dac", codec_model=str(models["dac"]), codebooks=1
    )
    manifest = build_corpus(spec, tmp_path / "out", workers=1)
    assert manifest.codec.sample_rate == RATE
    assert manifest.frames == 2000
    assert sum(manifest.hours(split) for split in manifest.splits) > 1 / 120


def test_an_interrupted_build_goes_on_to_the_same_corpus(
    spec_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_corpus(spec_of("dac"), tmp_path / "whole", workers=1)
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
def test_the_number_of_workers_does_not_show(spec_of, tmp_path: Path) -> None:
    prints = {build_corpus(spec_of("dac"), tmp_path / str(n), workers=n).fingerprint for n in (1, 2)}
    assert len(prints) == 1


def test_another_place_of_the_model_is_the_same_corpus_and_other_weights_are_not(
    spec_of, models: dict[str, Path], tmp_path: Path
) -> None:
    first = build_corpus(spec_of("dac"), tmp_path / "out", workers=1)
    moved = shutil.copytree(models["dac"], tmp_path / "moved")
    assert build_corpus(spec_of("dac", codec_model=str(moved)), tmp_path / "out") == first
    other = write_model("dac", tmp_path / "other", seed=5)
    with pytest.raises(InputError, match=r"was built from another specification \(codec: "):
        build_corpus(spec_of("dac", codec_model=str(other)), tmp_path / "out")
    with pytest.raises(InputError, match=r"spec\.codebooks: 2 before, 3 now"):
        build_corpus(spec_of("dac", codebooks=3), tmp_path / "out")


def test_a_codec_that_has_changed_is_named(spec_of, tmp_path: Path) -> None:
    build_corpus(spec_of("dac"), tmp_path / "out", workers=1)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.codec_files.keys() == {
        f"codec/{n}" for n in ("codec.json", "config.json", "model.safetensors")
    }
    verify_corpus(tmp_path / "out", manifest)
    weights = tmp_path / "out/codec/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"codec/model\.safetensors: sha256 is .* the file has changed"):
        verify_corpus(tmp_path / "out", manifest)


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


def test_wrong_wishes_write_nothing(spec_of, tmp_path: Path) -> None:
    for spec, device, said in (
        (spec_of("dac", codebooks=12), "cpu", "codebooks is 12, but the dac model has 9"),
        (spec_of("dac", codec_model=str(tmp_path / "none")), "cpu", "neither a folder nor a model"),
        (spec_of("dac", segment_seconds=0.006), "cpu", "less than two frames of codec dac"),
        (spec_of("dac"), "tpu", "--device tpu: there is none here"),
        (spec_of("dac").model_copy(update={"codec": "rvq"}), "cuda", "codec rvq computes on the cpu"),
    ):
        with pytest.raises(InputError, match=said):
            build_corpus(spec, tmp_path / "out", workers=1, device=device)
    assert not (tmp_path / "out").exists()


def test_audio_is_cut_wherever_its_blocks_end() -> None:
    signal = np.arange(1000, dtype=np.float32)
    for seed in range(5):
        cuts = np.sort(np.random.default_rng(seed).integers(0, 1000, 20))
        pieces = list(tracks._cut(np.split(signal, cuts), 150))
        assert [len(piece) for piece in pieces] == [150] * 6 + [100]
        assert np.array_equal(np.concatenate(pieces), signal)
