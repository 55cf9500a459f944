"""A model one position at a time: what it holds of all positions before, so that the next costs the same wherever
it stands.

A mixer holds its state and the last inputs of its convolution, self-attention the keys and values of what it has
seen, cross-attention those of the text. What a `Decoder` says of a position is what `MusicLM.forward` says of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.model.blocks import (
    Context,
    CrossAttention,
    FeedForward,
    Layer,
    Mamba2Mixer,
    Residual,
    RMSNorm,
    SelfAttention,
)
from ssmttm.model.music_lm import MusicLM, positions_from_first, sinusoids
from ssmttm.model.packed import PackedLinear
from ssmttm.text.text_batch import TextBatch

Step = Callable[[Tensor], Tensor]
"""The next position (batch, d_model) through one sub-layer, which remembers it."""


class Decoder:
    """A model that has read a batch of captions and takes music step by step."""

    def __init__(self, model: MusicLM, text: TextBatch, steps: int) -> None:
        """Read the text; `steps` is the most music that will follow."""
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
                y, step = _begin(residual.layer, residual.norm(x), context, steps)
                self._layers.append((residual.norm, step))
                x = x + y

    def step(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, codebooks, vocabulary) after the next step's tokens (batch, codebooks)."""
        x = self._model.embed(tokens[:, :, None])[:, 0] + self._encodings[self._position]
        self._position += 1
        for norm, step in self._layers:
            x = x + step(norm(x))
        return torch.unflatten(self._head(x), -1, (self._model.config.n_codebooks, -1))


def _begin(layer: Layer, x: Tensor, context: Context, steps: int) -> tuple[Tensor, Step]:
    """What a sub-layer says of the prefix (batch, positions, d_model), and its way on from there."""
    if isinstance(layer, Mamba2Mixer):
        if x.shape[1] == 0:
            return x, MixerStep(layer, x.shape[0])
        y, entered, state = layer.read(x, context)
        return y, MixerStep(layer, x.shape[0], entered, state)
    if isinstance(layer, CrossAttention):
        return x, CrossAttentionStep(layer, context)
    if isinstance(layer, SelfAttention):
        if x.shape[1]:
            raise NotImplementedError("self-attention behind a prefix: no architecture has it")
        return x, SelfAttentionStep(layer, x.shape[0], steps)
    return layer(x, context), FeedForwardStep(layer)


class MixerStep:
    """A Mamba-2 mixer as a recurrence."""

    def __init__(
        self, layer: Mamba2Mixer, batch: int, entered: Tensor | None = None, state: Tensor | None = None
    ) -> None:
        self._layer = layer
        self._in_proj = PackedLinear(layer.in_proj.weight)
        self._out_proj = PackedLinear(layer.out_proj.weight)
        assert layer.conv1d.bias is not None
        weight, self._bias = layer.conv1d.weight[:, 0], layer.conv1d.bias  # (channels, taps), (channels,)
        channels, taps = weight.shape
        self._window = weight.new_zeros(taps, batch, channels)
        """The last inputs of the convolution, that of position t in slot t modulo taps."""
        if entered is not None:
            known = min(taps, entered.shape[1])
            self._window[taps - known :] = entered[:, -known:].transpose(0, 1)
        # Which tap a slot meets turns with the position; all turns are laid out once, so that no slot is moved.
        slots = torch.arange(taps)
        self._taps = [weight.T[(slots - turn - 1) % taps, None].contiguous() for turn in range(taps)]
        self._turn = 0
        if state is None:
            width = layer.d_inner // layer.heads
            state = weight.new_zeros(batch, layer.heads, layer.d_state, width, dtype=torch.float32)
        # (batch groups, d_state, heads of a group, head_dim): heads that share B and C lie side by side, as one matrix.
        by_group = torch.unflatten(state, 1, (layer.groups, -1)).transpose(2, 3)
        self._state = by_group.flatten(0, 1).contiguous()
        self._A, self._D = -layer.A_log.float().exp(), layer.D.float()[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the next position (batch, d_model) reads, and remember it."""
        layer, batch, n = self._layer, x.shape[0], self._layer.groups * self._layer.d_state
        z, xBC, dt = torch.split(
            self._in_proj(x), [layer.d_inner, layer.d_inner + 2 * n, layer.heads], dim=-1
        )
        self._window[self._turn] = xBC
        mixed = F.silu((self._window * self._taps[self._turn]).sum(0) + self._bias).float()
        self._turn = (self._turn + 1) % len(self._taps)

        values, B, C = torch.split(mixed, [layer.d_inner, n, n], dim=-1)
        values = values.reshape(batch, layer.heads, -1)
        dt = F.softplus(dt.float() + layer.dt_bias)  # (batch, heads)
        groups = batch * layer.groups
        self._state.mul_((dt * self._A).exp().view(groups, 1, -1, 1))
        state = self._state.flatten(2)  # (batch groups, d_state, columns), the same memory
        state.addcmul_(B.reshape(groups, -1, 1), (values * dt[..., None]).view(groups, 1, -1))
        y = torch.bmm(C.reshape(groups, 1, -1), state).view(values.shape)
        y = torch.addcmul(y, values, self._D)
        return self._out_proj(layer.norm(y.flatten(1).to(z.dtype), z))


class SelfAttentionStep:
    """Self-attention that keeps keys and values, in room that is taken once."""

    def __init__(self, layer: SelfAttention, batch: int, steps: int) -> None:
        self._head_dim = layer.head_dim
        width = layer.q_proj.weight.shape[0]
        room = (batch, width // layer.head_dim, steps, layer.head_dim)
        self._keys, self._values = (layer.k_proj.weight.new_zeros(room) for _ in range(2))
        self._in_proj = PackedLinear(
            torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
        )
        self._out_proj = PackedLinear(layer.out_proj.weight)
        self._seen = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the next position (batch, d_model) reads, and remember it."""
        q, k, v = torch.unflatten(self._in_proj(x), -1, (3, -1, self._head_dim)).unbind(1)
        self._keys[:, :, self._seen], self._values[:, :, self._seen] = k, v
        self._seen += 1
        keys, values = self._keys[:, :, : self._seen], self._values[:, :, : self._seen]
        read = F.scaled_dot_product_attention(q[:, :, None], keys, values)
        return self._out_proj(read.flatten(1))


class CrossAttentionStep:
    """Attention to the text, whose keys and values are made once."""

    def __init__(self, layer: CrossAttention, context: Context) -> None:
        assert context.memory is not None
        self._head_dim, self._mask = layer.head_dim, context.memory_mask
        self._q_proj, self._out_proj = PackedLinear(layer.q_proj.weight), PackedLinear(layer.out_proj.weight)
        self._keys, self._values = (
            torch.unflatten(project(context.memory), -1, (-1, layer.head_dim)).transpose(1, 2).contiguous()
            for project in (layer.k_proj, layer.v_proj)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the next position (batch, d_model) reads."""
        q = torch.unflatten(self._q_proj(x), -1, (-1, 1, self._head_dim))
        read = F.scaled_dot_product_attention(q, self._keys, self._values, attn_mask=self._mask)
        return self._out_proj(read.flatten(1))


class FeedForwardStep:
    """The feed-forward layer, which remembers nothing."""

    def __init__(self, layer: FeedForward) -> None:
        self._up = PackedLinear(layer.up.weight, layer.up.bias)
        self._down = PackedLinear(layer.down.weight, layer.down.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the next position (batch, d_model) transformed."""
        return self._down(F.gelu(self._up(x)))
