"""The weights of a neural codec's network, read without running anything a file might hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmttm.compat import tame_torchaudio
from ssmttm.errors import InputError
from ssmttm.pretrained import CONFIG, pretrained_folder, read_config

if TYPE_CHECKING:
    from torch import Tensor, nn

CODEC_FILES = (CONFIG, "*.safetensors", "model.safetensors.index.json")


def codec_folder(model: str, kind: str) -> Path:
    """Return the folder of a codec model's files; raises InputError where they are missing or another kind's."""
    folder = pretrained_folder(model, "codec model", CODEC_FILES, f"{CONFIG} and model.safetensors")
    found = read_config(folder).get("model_type")
    if found != kind:
        raise InputError(f"{folder / CONFIG}: model_type is {found!r}; a model for codec {kind} has {kind!r}")
    return folder


def network_of(folder: Path, config_class: str, model_class: str) -> "nn.Module":
    """Return a network of transformers with the configuration and weights of a folder; InputError where damaged."""
    tame_torchaudio()
    import safetensors.torch
    import transformers

    try:
        config = getattr(transformers, config_class).from_dict(read_config(folder))
        network: nn.Module = getattr(transformers, model_class)(config)
    except InputError:
        raise
    except Exception as error:  # transformers checks a configuration in several ways, each with its own error
        raise InputError(f"{folder / CONFIG}: not a configuration of {model_class}: {error}") from error
    tensors: dict[str, Tensor] = {}
    whole = folder / "model.safetensors"
    for path in [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")):
        try:
            tensors |= safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: not whole: {error}") from error
    fill(network, tensors, str(folder))
    return network


def fill(network: "nn.Module", tensors: Mapping[str, Any], where: str) -> None:
    """Give a network its weights, in float32, and put it in evaluation mode; InputError unless all are there."""
    renamed = {_parametrised(name): tensor.float() for name, tensor in tensors.items()}
    try:
        missing = network.load_state_dict(renamed, strict=False).missing_keys
    except RuntimeError as error:
        raise InputError(f"{where}: the weights are not those of its configuration: {error}") from error
    if missing:
        raise InputError(f"{where}: the weights lack {missing[0]} and {len(missing) - 1} others")
    network.eval().requires_grad_(requires_grad=False)


def _parametrised(name: str) -> str:
    """Weight normalisation was once stored as weight_g and weight_v, as many published models still have it."""
    return name.replace(".weight_g", ".parametrizations.weight.original0").replace(
        ".weight_v", ".parametrizations.weight.original1"
    )
