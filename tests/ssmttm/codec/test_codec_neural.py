"""EnCodec and DAC with small random networks: their codes, their number of frames, and their fingerprints."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from ssmttm.codec.dac import DacNetwork
from ssmttm.codec.encodec import EncodecNetwork
from ssmttm.codec.load import load_codec
from ssmttm.codec.neural import NeuralCodec
from ssmttm.compat import torchaudio_at_import
from ssmttm.errors import InputError
from tests.conftest import flip_a_byte
from tests.ssmttm.neural import HOP, RATE, fill_codebooks, noise, write_model

Models = dict[str, Path]


@pytest.fixture(params=["dac", "encodec"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def codec_of(models: Models) -> Callable[..., NeuralCodec]:
    return lambda kind, codebooks=3: NeuralCodec.of_model(kind, str(models[kind]), codebooks)


@pytest.fixture
def codec(kind: str, codec_of: Any) -> NeuralCodec:
    return codec_of(kind)


def test_codes_are_those_of_the_published_implementation(
    kind: str, codec: NeuralCodec, models: Models
) -> None:
    from transformers import DacModel, EncodecModel

    audio = noise(1, 50 * HOP)
    loader, choice = (DacModel, {"n_quantizers": 3}) if kind == "dac" else (EncodecModel, {"bandwidth": 9.6})
    model = loader.from_pretrained(models[kind]).eval()
    with torch.inference_mode():
        theirs = model.encode(torch.from_numpy(audio)[:, None], **choice).audio_codes.numpy()
    ours = codec.encode(audio)
    assert np.array_equal(ours, theirs.reshape(1, -1, 50)[:, :3])
    assert all(len(np.unique(book)) > 20 for book in ours[0])


@pytest.mark.parametrize("samples", [1, HOP, 7 * HOP - 1, 7 * HOP + 1])
def test_a_part_of_a_hop_is_a_frame(samples: int, codec: NeuralCodec) -> None:
    audio = noise(1, samples)
    codes = codec.encode(audio)
    frames = -(-samples // HOP)
    assert codes.shape == (1, 3, frames)
    assert codes.dtype == np.uint16
    whole = np.pad(audio, ((0, 0), (0, frames * HOP - samples)))
    assert np.array_equal(codec.encode(whole), codes)
    decoded = codec.decode(codes)
    assert decoded.shape == whole.shape
    assert decoded.dtype == np.float32
    assert np.abs(decoded).max() <= 1


def test_a_clip_has_the_same_codes_in_a_batch_and_alone(codec: NeuralCodec) -> None:
    audio = noise(3, 2 * RATE + 13)
    codes = codec.encode(audio)
    for row, signal in enumerate(audio):
        assert np.array_equal(codec.encode(signal[None])[0], codes[row])
        assert np.array_equal(codec.decode(codes[row : row + 1])[0], codec.decode(codes)[row])
    assert codec.encode(audio[:0]).shape == (0, 3, 401)


def test_fewer_codebooks_are_the_first_ones(kind: str, codec_of: Any) -> None:
    audio = noise(1, RATE)
    one, all_of_them = codec_of(kind, 1), codec_of(kind, 8)
    codes = all_of_them.encode(audio)
    assert np.array_equal(one.encode(audio), codes[:, :1])
    assert one.facts.n_codebooks == 1
    assert np.array_equal(one.decode(codes[:, :1]), all_of_them.decode(codes[:, :1]))
    assert one.fingerprint != all_of_them.fingerprint


def test_facts_are_read_from_the_model(kind: str, codec: NeuralCodec) -> None:
    facts = codec.facts
    assert (facts.name, facts.sample_rate, facts.frame_rate) == (kind, RATE, 200.0)
    assert (facts.n_codebooks, facts.codebook_size) == (3, 64)


def test_a_frame_rate_that_is_no_whole_number_is_exact(tmp_path: Path) -> None:
    model = write_model("dac", tmp_path, sampling_rate=44100, downsampling_ratios=[2, 4, 8, 8])
    codec = NeuralCodec.of_model("dac", str(model), 1)
    assert codec.facts.frame_rate == 44100 / 512
    assert codec.encode(np.zeros((1, 44100 * 3), np.float32)).shape == (1, 1, 259)


def test_long_audio_goes_through_in_parts(
    kind: str, codec: NeuralCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = noise(1, 6 * RATE)
    whole = codec.encode(audio)
    decoded = codec.decode(whole)
    lengths = []
    network = type(codec.network)
    real = network.encode

    def watched(self: Any, signal: torch.Tensor, books: int) -> torch.Tensor:
        lengths.append(signal.shape[1])
        return real(self, signal, books)

    monkeypatch.setattr(network, "encode", watched)
    monkeypatch.setattr(DacNetwork, "window_seconds", 1)
    monkeypatch.setattr(EncodecNetwork, "window_seconds", 1)
    monkeypatch.setattr(EncodecNetwork, "context_seconds", 0.2)
    parts = codec.encode(audio)
    assert max(lengths) <= 1.4 * RATE
    # DAC's parts see the whole reach of its convolutions; EnCodec's LSTM reaches further, with little effect.
    assert (parts == whole).mean() == 1 if kind == "dac" else (parts == whole).mean() > 0.98
    assert np.abs(codec.decode(whole) - decoded).max() < (1e-6 if kind == "dac" else 0.02)


def test_a_saved_codec_is_the_same_codec(kind: str, codec: NeuralCodec, tmp_path: Path) -> None:
    audio = noise(1, RATE)
    codec.save(tmp_path / "codec")
    moved = (tmp_path / "codec").rename(tmp_path / "elsewhere")
    loaded = load_codec(moved)
    assert loaded.facts == codec.facts
    assert np.array_equal(loaded.encode(audio), codec.encode(audio))
    assert NeuralCodec.of_model(kind, str(moved), 3).fingerprint == codec.fingerprint


def test_other_weights_and_other_rates_are_another_codec(
    kind: str, codec: NeuralCodec, tmp_path: Path
) -> None:
    other = NeuralCodec.of_model(kind, str(write_model(kind, tmp_path / "a", seed=1)), 3)
    faster = NeuralCodec.of_model(kind, str(write_model(kind, tmp_path / "b", sampling_rate=16000)), 3)
    assert len({codec.fingerprint, other.fingerprint, faster.fingerprint}) == 3


def test_weights_with_the_names_of_older_files_are_the_same(
    codec_of: Any, models: Models, tmp_path: Path
) -> None:
    old = shutil.copytree(models["encodec"], tmp_path / "old")
    tensors = safetensors.torch.load_file(old / "model.safetensors")
    renamed = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    safetensors.torch.save_file(renamed, old / "model.safetensors")
    assert NeuralCodec.of_model("encodec", str(old), 3).fingerprint == codec_of("encodec").fingerprint


def test_a_damaged_saved_codec_is_refused(codec_of: Any, tmp_path: Path) -> None:
    codec_of("dac").save(tmp_path)
    weights = tmp_path / "model.safetensors"
    flip_a_byte(weights, -1)
    with pytest.raises(
        InputError, match=r"model\.safetensors: does not match the fingerprint in codec\.json"
    ):
        load_codec(tmp_path)
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated or damaged"):
        load_codec(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"lacks config\.json or \*\.safetensors"):
        load_codec(tmp_path)
    (tmp_path / "codec.json").write_text('{"name": "dac"}')
    with pytest.raises(
        InputError, match=r"codec\.json: this version cannot read the codec: KeyError\('codebooks'\)"
    ):
        load_codec(tmp_path)


def test_incomplete_weights_are_refused(models: Models, tmp_path: Path) -> None:
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


def test_missing_and_wrong_models_are_explained(models: Models, tmp_path: Path) -> None:
    pickled = shutil.copytree(models["dac"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for model, codebooks, device, message in (
        (None, 1, "cpu", r"codec model 'descript/dac_44khz' .*put its config\.json and model"),
        (models["encodec"], 1, "cpu", "model_type is 'encodec'; a model for codec dac has 'dac'"),
        (pickled, 1, "cpu", r"pickled lacks config\.json or \*\.safetensors"),
        (models["dac"], 10, "cpu", "codebooks is 10, but the dac model has 9"),
        (models["dac"], 1, "gpu", "--device gpu: no such device here; torch can use cpu"),
    ):
        with pytest.raises(InputError, match=message):
            NeuralCodec.of_model("dac", model and str(model), codebooks, device)


@pytest.mark.parametrize(
    "changed", [{"audio_channels": 2}, {"normalize": True}, {"chunk_length_s": 1.0, "overlap": 0.01}]
)
def test_models_whose_output_is_more_than_codes_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    write_model("encodec", tmp_path, **changed)
    with pytest.raises(InputError, match="is more than codes; use a mono model"):
        NeuralCodec.of_model("encodec", str(tmp_path), 1)


def test_codes_beyond_the_model_are_refused(codec: NeuralCodec) -> None:
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
            parameter.data *= 2  # its initial values give nearly equal outputs
    fill_codebooks(model.encoder, [layer._codebook.embed for layer in model.quantizer.vq.layers[:4]])
    folder = tmp_path_factory.mktemp("package")
    save_checkpoint(model.state_dict(), folder)
    return model, folder


def save_checkpoint(content: object, folder: Path) -> Path:
    """Save a file under the package's name, which ends with the start of its sha256."""
    torch.save(content, folder / "draft")
    digest = hashlib.sha256((folder / "draft").read_bytes()).hexdigest()[:8]
    return (folder / "draft").rename(folder / f"encodec_24khz-{digest}.th")


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_checkpoint_of_the_package_gives_its_codes_and_sound(package_model: tuple[Any, Path]) -> None:
    model, folder = package_model
    model.set_target_bandwidth(3.0)
    audio = noise(1, 24000)
    codec = NeuralCodec.of_model("encodec", str(folder), 4)
    codes = codec.encode(audio)
    with torch.inference_mode():
        theirs = model.encode(torch.from_numpy(audio)[:, None])
        decoded = model.decode(theirs)
    assert np.array_equal(codes, theirs[0][0].numpy())
    assert all(len(np.unique(book)) > 5 for book in codes[0])
    assert np.allclose(codec.decode(codes), np.clip(decoded[:, 0].numpy(), -1, 1), atol=1e-5)


def test_the_package_finds_its_published_model_and_runs_no_code_in_it(
    package_model: tuple[Any, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, folder = package_model
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetched = tmp_path / "hub" / "checkpoints" / "encodec_24khz-d7cc33bc.th"
    fetched.parent.mkdir(parents=True)
    shutil.copy(next(folder.glob("*.th")), fetched)
    found, read = (NeuralCodec.of_model("encodec", name, 4) for name in ("encodec_24khz", str(folder)))
    assert found.fingerprint == read.fingerprint
    assert capsys.readouterr().out == ""

    for content in ({"bomb": Bomb(tmp_path / "ran")}, [torch.zeros(2)], {"else": torch.zeros(2)}):
        torch.save(content, fetched)
        with pytest.raises(InputError, match="codec model 'encodec_24khz': the encodec package has no whole"):
            NeuralCodec.of_model("encodec", "encodec_24khz", 4)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_checkpoints_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    for content, message in (
        ({"bomb": Bomb(tmp_path / "ran")}, "not a checkpoint of weights alone"),
        ({"step": 3}, "it is not a mapping from names to tensors"),
        ([torch.zeros(2)], "it is not a mapping from names to tensors"),
        ({"else": torch.zeros(2)}, "the weights lack encoder"),
    ):
        with pytest.raises(InputError, match=message):
            NeuralCodec.of_model("encodec", str(save_checkpoint(content, tmp_path)), 1)
    assert not (tmp_path / "ran").exists()
    renamed = save_checkpoint({}, tmp_path).rename(tmp_path / "encodec_24khz-d7cc33bc.th")
    with pytest.raises(InputError, match="with the sha256 in its name; download it again"):
        NeuralCodec.of_model("encodec", str(renamed), 1)
    stereo = tmp_path / "stereo"
    stereo.mkdir()
    (stereo / "encodec_48khz-7e698e3e.th").touch()
    with pytest.raises(InputError, match="holds the stereo model, which is not supported"):
        NeuralCodec.of_model("encodec", str(stereo), 1)
