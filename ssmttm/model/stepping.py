"""Decoding one position at a time, from the state that each layer keeps of earlier positions.

A mixer keeps its state and the last inputs of its convolution, self-attention the keys and values of earlier positions,
cross-attention those of the text. The logits are those of `MusicLM.forward`.
"""

import torch
from torch import Tensor

from ssmttm.model.blocks import Residual, RMSNorm
from ssmttm.model.layers.sub_layer import Context, Step
from ssmttm.model.music_lm import MusicLM, positions_from_first, sinusoids
from ssmttm.model.packed import PackedLinear
from ssmttm.text.text_batch import TextBatch


class Decoder:
    """A model that has read a batch of captions and reads music step by step."""

    def __init__(self, model: MusicLM, text: TextBatch, steps: int) -> None:
        """Read the text, and reserve memory for at most `steps` steps of music."""
        self._model = model
        memory, mask = model.read_text(text)
        batch, positions = mask.shape
        if model.config.architecture.has_prefix:
            x = memory + sinusoids(positions_from_first(mask), memory)
            context = Context(mask=mask)
            self._position = positions_from_first(mask)[:, -1] + 1  # (batch,): where the music begins
        else:
            x = memory[:, :0]
            memory = memory + sinusoids(positions_from_first(mask), memory)
            context = Context(memory=memory, memory_mask=mask[:, None, None])
            self._position = torch.zeros(batch, dtype=torch.int64, device=mask.device)
        self._encodings = sinusoids(torch.arange(positions + steps, device=mask.device), memory)
        self._head = PackedLinear(model.head.weight)
        self._layers: list[tuple[RMSNorm, Step]] = []
        for residual in model.blocks.modules():
            if isinstance(residual, Residual):
                y, step = residual.layer.begin(residual.norm(x), context, steps)
                self._layers.append((residual.norm, step))
                x = x + y

    def step(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, codebooks, vocabulary) after the next step's tokens (batch, codebooks)."""
        x = self._model.embed(tokens[:, :, None])[:, 0] + self._encodings[self._position]
        self._position += 1
        for norm, step in self._layers:
            x = x + step(norm(x))
        return torch.unflatten(self._head(x), -1, (self._model.config.n_codebooks, -1))
