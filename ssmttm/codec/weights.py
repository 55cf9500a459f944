"""Read the weights of a neural codec's network without running any code a file may hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmttm.compat import tame_torchaudio
from ssmttm.errors import InputError
from ssmttm.pretrained import CONFIG, pretrained_folder, read_config

if TYPE_CHECKING:
    from torch import Tensor, nn


def codec_folder(model: str, kind: str) -> Path:
    """Return the folder of a codec model's files; raises InputError if they are missing or of another kind."""
    files = (CONFIG, "*.safetensors", "model.safetensors.index.json")
    folder = pretrained_folder(model, "codec model", files, f"{CONFIG} and model.safetensors")
    found = read_config(folder).get("model_type")
    if found != kind:
        raise InputError(f"{folder / CONFIG}: model_type is {found!r}; a model for codec {kind} has {kind!r}")
    return folder


def network_of(folder: Path, config_class: str, model_class: str) -> "nn.Module":
    """Return transformers' network with the configuration and weights of a folder; raises InputError if damaged."""
    tame_torchaudio()
    import safetensors.torch
    import transformers

    fields = read_config(folder)
    try:
        config = getattr(transformers, config_class).from_dict(fields)
        network: nn.Module = getattr(transformers, model_class)(config)
    except Exception as error:  # transformers checks a configuration in several ways, each with its own error
        raise InputError(f"{folder / CONFIG}: not a configuration of {model_class}: {error}") from error
    tensors: dict[str, Tensor] = {}
    whole = folder / "model.safetensors"
    for path in [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")):
        try:
            tensors |= safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: truncated or damaged: {error}") from error
    fill(network, tensors, str(folder))
    return network


def fill(network: "nn.Module", tensors: Mapping[str, Any], where: str) -> None:
    """Load all weights into a network, in float32 and evaluation mode; raises InputError if some are missing."""
    renamed = {_parametrised(name): tensor.float() for name, tensor in tensors.items()}
    try:
        missing = network.load_state_dict(renamed, strict=False).missing_keys
    except RuntimeError as error:
        raise InputError(f"{where}: the weights are not those of its configuration: {error}") from error
    if missing:
        raise InputError(f"{where}: the weights lack {missing[0]} and {len(missing) - 1} others")
    network.eval().requires_grad_(requires_grad=False)


def _parametrised(name: str) -> str:
    """Translate the old names of weight normalisation, weight_g and weight_v, which many published models have."""
    return name.replace(".weight_g", ".parametrizations.weight.original0").replace(
        ".weight_v", ".parametrizations.weight.original1"
    )
