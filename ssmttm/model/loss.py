"""The training loss: cross entropy of each codebook, in nats.

Its gradient is written by hand: logits are by far the largest tensors of a small model, and torch's loss with label
smoothing makes several of their size where two are enough.
"""

from typing import Any

import torch
from torch import Tensor

from ssmttm.model.patterns import IGNORED


def codebook_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy (codebooks,) in nats, float32, and the targets counted (codebooks,).

    logits: (batch, codebooks, steps, vocabulary). targets: (batch, codebooks, steps) int64, -100 ignored.
    label_smoothing: the share of a target's probability spread evenly over the vocabulary.
    """
    codebooks = targets.shape[1]
    # Steps before codebooks, as the head writes them, so that flattening copies nothing.
    flat = logits.transpose(1, 2).flatten(0, 2)
    wanted = targets.transpose(1, 2).flatten()
    losses = _CrossEntropy.apply(flat, wanted, label_smoothing)  # type: ignore[no-untyped-call]
    return losses.view(-1, codebooks).sum(0), (wanted != IGNORED).view(-1, codebooks).sum(0)


class _CrossEntropy(torch.autograd.Function):
    """Losses (n,) of logits (n, vocabulary) against targets (n,), 0 where ignored."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        log_p = torch.log_softmax(logits, 1, dtype=torch.float32)
        counted = targets != IGNORED
        index = targets.clamp(min=0)[:, None]
        losses = log_p.gather(1, index)[:, 0] * (smoothing - 1)
        if smoothing:
            losses.sub_(log_p.mean(1), alpha=smoothing)
        ctx.save_for_backward(log_p, index, counted)
        ctx.smoothing, ctx.dtype = smoothing, logits.dtype
        return losses.masked_fill_(~counted, 0.0)

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        log_p, index, counted = ctx.saved_tensors
        d_losses = (d_losses * counted)[:, None]
        # Probabilities minus targets.
        d_logits = log_p.exp()
        if ctx.smoothing:
            d_logits.sub_(ctx.smoothing / log_p.shape[1])
        d_logits.mul_(d_losses).scatter_add_(1, index, d_losses * (ctx.smoothing - 1))
        return d_logits.to(ctx.dtype), None, None
