"""Decoding one position at a time, from the state that each layer keeps of earlier positions.

A mixer keeps its state and the begun sums of its convolution, self-attention the keys and values of earlier positions,
cross-attention those of the text. The logits are those of `MusicLM.forward`.

All of it is reserved at the start and changed in place, so that a step is a fixed computation on fixed tensors: a CUDA
graph can repeat it (`ssmttm.model.repetition`). For each row of a batch, the memory is in elements of the weights' type

    self-attention     2 d_model steps
    cross-attention    2 d_model text positions
    Mamba-2            d_inner d_state + (d_conv + 1) (d_inner + 2 n_groups d_state), in float32
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.model.blocks import Residual, RMSNorm
from ssmttm.model.layers.attention import additive
from ssmttm.model.layers.sub_layer import Context, Now, Step
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
            self._first = positions_from_first(mask)[:, -1] + 1  # (batch,): where the music begins
        else:
            x = memory[:, :0]
            memory = memory + sinusoids(positions_from_first(mask), memory)
            context = Context(memory=memory, memory_mask=mask[:, None, None])
            self._first = torch.zeros(batch, dtype=torch.int64, device=mask.device)
        self.index = torch.zeros(1, dtype=torch.int64, device=mask.device)
        """(1,): the number of steps read, on the device."""
        seen = torch.zeros(1, 1, 1, steps, dtype=torch.bool, device=mask.device)
        self._mask = additive(seen, memory.dtype)
        self._encodings = sinusoids(torch.arange(positions + steps, device=mask.device), memory)
        self._head = PackedLinear(model.head.weight)
        self._layers: list[tuple[RMSNorm, Step]] = []
        for residual in model.blocks.modules():
            if isinstance(residual, Residual):
                y, step = residual.layer.begin(residual.norm(x), context, steps)
                self._layers.append((residual.norm, step))
                x = x + y

    def step(self, tokens: Tensor, reach: int) -> Tensor:
        """Return logits (batch, codebooks, vocabulary) after the next step's tokens (batch, codebooks).

        reach: at least the number of steps read, this one included. A recording of the step can be repeated until that
        many have been read. A larger reach costs time and changes logits by rounding only.
        """
        position = F.embedding(self._first + self.index, self._encodings)
        x = self._model.embed(tokens[:, :, None])[:, 0] + position
        now = Now(self.index, self._mask.index_fill_(-1, self.index, 0)[..., :reach])
        for norm, step in self._layers:
            x = x + step(norm(x), now)
        self.index += 1
        return torch.unflatten(self._head(x), -1, (self._model.config.n_codebooks, -1))
