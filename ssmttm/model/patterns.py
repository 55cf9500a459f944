"""The delay pattern: codebook k is k steps late, so that one step predicts a token of every codebook.

One clip of three frames and two codebooks, with S the special token and . a position without a target:

    inputs   S a0 a1 a2      targets   a0 a1 a2 .
             S S  b0 b1                .  b0 b1 b2

The pattern [0, 1, 2, ..] of "Simple and Controllable Music Generation" (arXiv 2306.05284, section 2.2). Every code is a
target exactly once; an input is the target of the step before, or the special token.
"""

import torch
from torch import Tensor

IGNORED = -100
"""The target that the loss leaves out (the default ignore_index of torch's cross entropy)."""


def delay(codes: Tensor, lengths: Tensor | None, special: int) -> tuple[Tensor, Tensor]:
    """Return the model's inputs and targets (batch, codebooks, frames + codebooks - 1) for codes in time order.

    codes: (batch, codebooks, frames) int64. lengths: (batch,) valid frames of each clip, None for all of them; frames
    past a clip's length are the special token as inputs and ignored as targets.
    """
    batch, codebooks, frames = codes.shape
    valid = None
    if lengths is not None:
        valid = torch.arange(frames, device=codes.device) < lengths[:, None]  # (batch, frames)
        codes = torch.where(valid[:, None], codes, special)
    steps = frames + codebooks - 1
    inputs = codes.new_full((batch, codebooks, steps), special)
    targets = codes.new_full((batch, codebooks, steps), IGNORED)
    for k in range(codebooks):
        # The code written at step s is read at step s + 1; the last one is never read.
        reach = min(frames, steps - k - 1)
        inputs[:, k, k + 1 : k + 1 + reach] = codes[:, k, :reach]
        written = codes[:, k] if valid is None else torch.where(valid, codes[:, k], IGNORED)
        targets[:, k, k : k + frames] = written
    return inputs, targets


def undelay(tokens: Tensor) -> Tensor:
    """Return codes (batch, codebooks, frames) in time order.

    tokens: (batch, codebooks, frames + codebooks - 1), in the layout of the targets of `delay`.
    """
    codebooks, steps = tokens.shape[1], tokens.shape[2]
    frames = steps - codebooks + 1
    return torch.stack([tokens[:, k, k : k + frames] for k in range(codebooks)], dim=1)
