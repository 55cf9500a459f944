"""EnCodec and DAC of small random networks: codes are the networks' own, exact in number, known by what made them."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import numpy as np
import pytest
import safetensors.torch
import torch

from ssmttm.codec import dac, encodec
from ssmttm.codec.load import load_codec
from ssmttm.codec.neural import NeuralCodec
from ssmttm.compat import torchaudio_at_import
from ssmttm.errors import InputError
from tests.ssmttm.neural import HOP, RATE, fill_codebooks, noise, write_model

KINDS = ("dac", "encodec")
Models = dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(kind, folder / kind) for kind in KINDS}


@pytest.fixture
def codec_of(models: Models) -> Callable[..., NeuralCodec]:
    return lambda kind, codebooks=3: NeuralCodec.of_model(kind, str(models[kind]), codebooks)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_published_implementation(kind: str, codec_of: Any, models: Models) -> None:
    from transformers import DacModel, EncodecModel

    audio = noise(1, 50 * HOP)
    loader, choice = (DacModel, {"n_quantizers": 3}) if kind == "dac" else (EncodecModel, {"bandwidth": 9.6})
    model = loader.from_pretrained(models[kind]).eval()
    with torch.inference_mode():
        theirs = model.encode(torch.from_numpy(audio)[:, None], **choice).audio_codes.numpy()
    ours = codec_of(kind).encode(audio)
    assert np.array_equal(ours, theirs.reshape(1, -1, 50)[:, :3])
    assert all(len(np.unique(book)) > 20 for book in ours[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, HOP, 7 * HOP - 1, 7 * HOP + 1])
def test_a_begun_hop_is_a_frame(kind: str, samples: int, codec_of: Any) -> None:
    codec, audio = codec_of(kind), noise(1, samples)
    codes = codec.encode(audio)
    frames = -(-samples // HOP)
    assert codes.shape == (1, 3, frames)
    assert codes.dtype == np.uint16
    whole = np.pad(audio, ((0, 0), (0, frames * HOP - samples)))
    assert np.array_equal(codec.encode(whole), codes)
    heard = codec.decode(codes)
    assert heard.shape == whole.shape
    assert heard.dtype == np.float32
    assert np.abs(heard).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_has_the_codes_in_a_batch_that_it_has_alone(kind: str, codec_of: Any) -> None:
    codec, audio = codec_of(kind), noise(3, 2 * RATE + 13)
    codes = codec.encode(audio)
    for row, signal in enumerate(audio):
        assert np.array_equal(codec.encode(signal[None])[0], codes[row])
        assert np.array_equal(codec.decode(codes[row : row + 1])[0], codec.decode(codes)[row])
    assert codec.encode(audio[:0]).shape == (0, 3, 401)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_codebooks_are_the_first_ones(kind: str, codec_of: Any) -> None:
    audio = noise(1, RATE)
    one, all_of_them = codec_of(kind, 1), codec_of(kind, 8)
    codes = all_of_them.encode(audio)
    assert np.array_equal(one.encode(audio), codes[:, :1])
    assert one.facts.n_codebooks == 1
    assert np.array_equal(one.decode(codes[:, :1]), all_of_them.decode(codes[:, :1]))
    assert one.fingerprint != all_of_them.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_read_from_the_model(kind: str, codec_of: Any) -> None:
    facts = codec_of(kind).facts
    assert (facts.name, facts.sample_rate, facts.frame_rate) == (kind, RATE, 200.0)
    assert (facts.n_codebooks, facts.codebook_size) == (3, 64)


def test_a_rate_that_is_no_multiple_of_the_hop_is_exact(tmp_path: Path) -> None:
    model = write_model("dac", tmp_path, sampling_rate=44100, downsampling_ratios=[2, 4, 8, 8])
    codec = NeuralCodec.of_model("dac", str(model), 1)
    assert codec.facts.frame_rate == 44100 / 512
    assert codec.encode(np.zeros((1, 44100 * 3), np.float32)).shape == (1, 1, 259)


@pytest.mark.parametrize("kind", KINDS)
def test_long_audio_goes_through_in_parts(kind: str, codec_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, audio = codec_of(kind), noise(1, 6 * RATE)
    whole = codec.encode(audio)
    heard = codec.decode(whole)
    longest = []
    network = type(codec.network)
    real = network.encode

    def watched(self: Any, signal: torch.Tensor, books: int) -> torch.Tensor:
        longest.append(signal.shape[1])
        return real(self, signal, books)

    monkeypatch.setattr(network, "encode", watched)
    monkeypatch.setattr(dac, "_WINDOW_SECONDS", 1)
    monkeypatch.setattr(encodec, "_WINDOW_SECONDS", 1)
    monkeypatch.setattr(encodec, "_CONTEXT_SECONDS", 0.2)
    parts = codec.encode(audio)
    assert max(longest) <= 1.4 * RATE
    # DAC is all convolutions, so that its parts see all they need; EnCodec's LSTM has forgotten little that matters.
    assert (parts == whole).mean() == 1 if kind == "dac" else (parts == whole).mean() > 0.98
    assert np.abs(codec.decode(whole) - heard).max() < (1e-6 if kind == "dac" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_codec_is_the_same_codec(kind: str, codec_of: Any, tmp_path: Path) -> None:
    codec, audio = codec_of(kind), noise(1, RATE)
    codec.save(tmp_path / "codec")
    moved = (tmp_path / "codec").rename(tmp_path / "elsewhere")
    loaded = load_codec(moved)
    assert loaded.facts == codec.facts
    assert np.array_equal(loaded.encode(audio), codec.encode(audio))
    assert NeuralCodec.of_model(kind, str(moved), 3).fingerprint == codec.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_and_other_rates_are_another_codec(kind: str, codec_of: Any, tmp_path: Path) -> None:
    other = NeuralCodec.of_model(kind, str(write_model(kind, tmp_path / "a", seed=1)), 3)
    faster = NeuralCodec.of_model(kind, str(write_model(kind, tmp_path / "b", sampling_rate=16000)), 3)
    assert len({codec_of(kind).fingerprint, other.fingerprint, faster.fingerprint}) == 3


def test_weights_with_the_names_of_older_files_are_the_same(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models["encodec"], tmp_path / "old")
    tensors = safetensors.torch.load_file(tmp_path / "old/model.safetensors")
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    safetensors.torch.save_file(old, tmp_path / "old/model.safetensors")
    fingerprints = {
        NeuralCodec.of_model("encodec", str(folder), 3).fingerprint
        for folder in (models["encodec"], tmp_path / "old")
    }
    assert len(fingerprints) == 1


def test_a_damaged_saved_codec_is_refused(codec_of: Any, tmp_path: Path) -> None:
    codec_of("dac").save(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: does not fit the fingerprint in codec\.json"):
        load_codec(tmp_path)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors: not whole"):
        load_codec(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"lacks config\.json or \*\.safetensors"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text('{"name": "dac"}')
    with pytest.raises(InputError, match=r"codec\.json: not a codec this version reads"):
        load_codec(tmp_path)


def test_weights_that_are_not_all_there_are_refused(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models["dac"], tmp_path / "part")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors.pop("decoder.conv1.weight")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"part: the weights lack decoder\.conv1\.weight"):
        NeuralCodec.of_model("dac", str(folder), 1)
    tensors["decoder.conv1.weight"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="not those of its configuration"):
        NeuralCodec.of_model("dac", str(folder), 1)


def test_models_that_cannot_be_had_are_explained(models: Models, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"codec model 'descript/dac_44khz' .*put its config\.json and model"
    ):
        NeuralCodec.of_model("dac", None, 1)
    with pytest.raises(InputError, match="model_type is 'encodec'; a model for codec dac has 'dac'"):
        NeuralCodec.of_model("dac", str(models["encodec"]), 1)
    pickled = shutil.copytree(models["dac"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled lacks config\.json or \*\.safetensors"):
        NeuralCodec.of_model("dac", str(pickled), 1)
    with pytest.raises(InputError, match="codebooks is 10, but the dac model has 9"):
        NeuralCodec.of_model("dac", str(models["dac"]), 10)
    with pytest.raises(InputError, match="--device gpu: there is none here; torch can use cpu"):
        NeuralCodec.of_model("dac", str(models["dac"]), 1, "gpu")


@pytest.mark.parametrize(
    "changed",
    [
        {"audio_channels": 2},
        {"normalize": True},
        {"chunk_length_s": 1.0, "overlap": 0.01},
    ],
)
def test_models_whose_codes_are_not_all_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    write_model("encodec", tmp_path, **changed)
    with pytest.raises(InputError, match="only mono models whose codes are all there is"):
        NeuralCodec.of_model("encodec", str(tmp_path), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_the_model_has_not_are_refused(kind: str, codec_of: Any) -> None:
    codec = codec_of(kind)
    with pytest.raises(InputError, match="code 64 of a codebook of 64"):
        codec.decode(np.full((1, 3, 4), 64, dtype=np.uint16))
    with pytest.raises(InputError, match="10 codebooks of a"):
        codec.decode(np.zeros((1, 10, 4), dtype=np.uint16))


@pytest.fixture(scope="module")
def package_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The encodec package's own 24 kHz model with random weights, and the folder of its checkpoint."""
    with torchaudio_at_import():
        from encodec import EncodecModel
    torch.manual_seed(0)
    model = EncodecModel.encodec_model_24khz(pretrained=False)
    for name, parameter in model.encoder.named_parameters():
        if name.endswith("weight_g"):
            parameter.data *= 2  # as it is initialised, everything is nearly the same
    fill_codebooks(model.encoder, [layer._codebook.embed for layer in model.quantizer.vq.layers[:4]])
    folder = tmp_path_factory.mktemp("package")
    draft = folder / "draft"
    torch.save(model.state_dict(), draft)
    draft.rename(folder / f"encodec_24khz-{hashlib.sha256(draft.read_bytes()).hexdigest()[:8]}.th")
    return model, folder


def test_a_checkpoint_of_the_package_gives_the_packages_codes_and_sound(
    package_model: tuple[Any, Path],
) -> None:
    model, folder = package_model
    model.set_target_bandwidth(3.0)
    audio = noise(1, 24000)
    codec = NeuralCodec.of_model("encodec", str(folder), 4)
    codes = codec.encode(audio)
    with torch.inference_mode():
        theirs = model.encode(torch.from_numpy(audio)[:, None])
        heard = model.decode(theirs)
    assert np.array_equal(codes, theirs[0][0].numpy())
    assert all(len(np.unique(book)) > 5 for book in codes[0])
    assert np.allclose(codec.decode(codes), np.clip(heard[:, 0].numpy(), -1, 1), atol=1e-5)


def test_the_package_finds_its_published_model_by_name_and_runs_nothing_it_holds(
    package_model: tuple[Any, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    _, folder = package_model
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetched = tmp_path / "hub" / "checkpoints" / "encodec_24khz-d7cc33bc.th"
    fetched.parent.mkdir(parents=True)
    shutil.copy(next(folder.glob("*.th")), fetched)
    audio = noise(1, 24000)
    found, read = (NeuralCodec.of_model("encodec", name, 4) for name in ("encodec_24khz", str(folder)))
    assert np.array_equal(found.encode(audio), read.encode(audio))
    assert capsys.readouterr().out == ""

    for content in ({"bomb": Bomb()}, [torch.zeros(2)], {"else": torch.zeros(2)}):
        torch.save(content, fetched)
        with pytest.raises(InputError, match="codec model 'encodec_24khz': the encodec package has no whole"):
            NeuralCodec.of_model("encodec", "encodec_24khz", 4)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_checkpoints_that_are_not_weights_are_refused(
    package_model: tuple[Any, Path], tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    def put(content: object, name: str = "encodec_24khz") -> Path:
        torch.save(content, tmp_path / "draft")
        digest = hashlib.sha256((tmp_path / "draft").read_bytes()).hexdigest()[:8]
        return (tmp_path / "draft").rename(tmp_path / f"{name}-{digest}.th")

    with pytest.raises(InputError, match="not a checkpoint of weights alone"):
        NeuralCodec.of_model("encodec", str(put({"bomb": Bomb()})), 1)
    assert not (tmp_path / "ran").exists()
    for content in ({"step": 3}, [torch.zeros(2)]):
        with pytest.raises(InputError, match="it holds other things than tensors by name"):
            NeuralCodec.of_model("encodec", str(put(content)), 1)
    renamed = put({}).rename(tmp_path / "encodec_24khz-d7cc33bc.th")
    with pytest.raises(InputError, match="with the sha256 its name says; fetch it again"):
        NeuralCodec.of_model("encodec", str(renamed), 1)
    with pytest.raises(InputError, match="the weights lack encoder"):
        NeuralCodec.of_model("encodec", str(put({"else": torch.zeros(2)})), 1)
    stereo = tmp_path / "stereo"
    stereo.mkdir()
    (stereo / "encodec_48khz-7e698e3e.th").touch()
    with pytest.raises(InputError, match="holds the stereo model, which cannot be used"):
        NeuralCodec.of_model("encodec", str(stereo), 1)
