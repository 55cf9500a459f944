"""Neural codecs of a few thousand random weights, in folders as transformers saves them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmttm.compat import tame_torchaudio

torch.set_num_threads(1)  # threads cost more than they save at these sizes

RATE = 8000
HOP = 40
DAC = {
    "encoder_hidden_size": 4,
    "decoder_hidden_size": 32,
    "downsampling_ratios": [2, 4, 5],
    "n_codebooks": 9,
    "codebook_size": 64,
    "codebook_dim": 4,
    "sampling_rate": RATE,
}
ENCODEC = {
    "num_filters": 4,
    "hidden_size": 16,
    "upsampling_ratios": [5, 4, 2],
    "codebook_size": 64,
    "sampling_rate": RATE,
    "target_bandwidths": [1.2, 2.4, 9.6],
}


def write_model(kind: str, folder: Path, seed: int = 0, **changed: Any) -> Path:
    """Save a small model of `dac` or `encodec` in transformers' own form."""
    tame_torchaudio()
    from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel

    torch.manual_seed(seed)
    if kind == "dac":
        model = DacModel(DacConfig(**(DAC | changed)))
        for parameter in model.encoder.parameters():
            parameter.data *= 5  # its initial values give outputs near zero
    else:
        model = EncodecModel(EncodecConfig(**(ENCODEC | changed)))
        codebooks = [layer.codebook.embed for layer in model.quantizer.layers]
        fill_codebooks(model.encoder, codebooks, model.config.audio_channels)
    model.save_pretrained(folder)
    return folder


def fill_codebooks(encoder: torch.nn.Module, codebooks: Iterable[torch.Tensor], channels: int = 1) -> None:
    """Draw each codebook from the residual of noise after the ones before; initial codebooks have one code for all."""
    with torch.inference_mode():
        audio = torch.from_numpy(noise(4, 20_000))[:, None].expand(-1, channels, -1)
        left = encoder(audio).mT.flatten(0, 1)
    for entries in codebooks:
        drawn = left[torch.randperm(len(left))[: min(len(entries), len(left) // 4)]]
        entries.data.fill_(1e3)  # farther than anything
        entries.data[: len(drawn)] = drawn
        left = left - entries[torch.cdist(left, entries).argmin(1)]


def noise(rows: int, samples: int, seed: int = 0) -> np.ndarray:
    """Return audio (rows, samples) with all frequencies, different in each row."""
    steps = np.random.default_rng(seed).normal(size=(rows, samples)).cumsum(axis=1)
    return (0.5 * np.sin(steps)).astype(np.float32)
