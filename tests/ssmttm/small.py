"""Small models and batches for the tests of the models."""

import numpy as np
import torch
from torch import nn

from ssmttm.model import architecture
from ssmttm.model.architecture import Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import ParameterCount
from ssmttm.model.music_lm import MusicLM
from ssmttm.model.stepping import Decoder
from ssmttm.text.byte_encoder import collate_bytes
from ssmttm.text.config import TextConfig
from ssmttm.text.text_batch import TextBatch

torch.set_num_threads(1)  # threads cost more than they save at these sizes

ARCHITECTURES = tuple(architecture.ARCHITECTURES)
CAPTIONS = ["calm piano", "a loud and heroic march for brass, in a major key", "x", "slow strings"]


def small_config(architecture: Architecture, **changes) -> ModelConfig:
    """Return a model of two blocks; `encoder="frozen"` or `text=` choose the text."""
    text = changes.pop("text", None) or TextConfig(encoder=changes.pop("encoder", "bytes"), dim=24)
    sizes = {
        "n_blocks": 2,
        "d_model": 32,
        "d_state": 16,
        "ssm_head_dim": 16,
        "head_dim": 16,
        "codebook_size": 40,
    }
    return ModelConfig(architecture=architecture, text=text, **(sizes | changes))


def small_model(config: ModelConfig, seed: int = 0) -> MusicLM:
    """Return a model in evaluation mode with logits of order one, so that differences show."""
    torch.manual_seed(seed)
    model = MusicLM(config).eval()
    torch.nn.init.normal_(model.head.weight, std=config.d_model**-0.5)
    torch.nn.init.normal_(model.null_condition)
    return model


def tokens_for(config: ModelConfig, batch: int, steps: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocabulary, (batch, config.n_codebooks, steps), generator=generator)


def text_for(config: ModelConfig, captions: list[str], dropped: list[bool] | None = None) -> TextBatch:
    """Return the bytes of captions, or random embeddings with a position for each word."""
    flags = np.array(dropped or [False] * len(captions))
    if config.text.encoder == "bytes":
        return collate_bytes(captions, flags, config.text)
    lengths = [len(caption.split()) for caption in captions]
    values = torch.zeros(len(captions), max(lengths), config.text.dim)
    for row, caption, length in zip(values, captions, lengths, strict=True):
        generator = torch.Generator().manual_seed(sum(caption.encode()))
        row[max(lengths) - length :] = torch.randn(length, config.text.dim, generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return TextBatch(values, mask, torch.from_numpy(flags))


def pad_left(text: TextBatch, positions: int, patch: int) -> TextBatch:
    """Return the same captions with more padding in front."""
    batch = text.mask.shape[0]
    if text.values.dtype == torch.int64:
        padding = torch.zeros(batch, positions * patch, dtype=torch.int64)
    else:
        padding = torch.randn(batch, positions, text.values.shape[2])  # masked values may be anything
    mask = torch.cat([torch.zeros(batch, positions, dtype=torch.bool), text.mask], 1)
    return TextBatch(torch.cat([padding, text.values], 1), mask, text.dropped)


def logits_by_steps(model: MusicLM, tokens: torch.Tensor, text: TextBatch) -> torch.Tensor:
    """Return the logits of tokens that a decoder reads one step at a time."""
    with torch.inference_mode():
        decoder = Decoder(model, text, tokens.shape[2])
        logits = torch.stack(
            [decoder.step(step, reach) for reach, step in enumerate(tokens.unbind(2), 1)], dim=2
        )
    return logits.clone()  # outside inference mode


def count_parameters(model: MusicLM) -> ParameterCount:
    """Return the trainable parameters of a built model by purpose."""

    def size(*modules: nn.Module | None) -> int:
        return sum(p.numel() for m in modules if m is not None for p in m.parameters() if p.requires_grad)

    return ParameterCount(
        backbone=size(model.blocks),
        embedding=size(model.embedding),
        head=size(model.head),
        text_projection=size(model.text_projection, model.text_norm),
        text_encoder=size(model.text_encoder),
        null_condition=model.null_condition.numel(),
    )
