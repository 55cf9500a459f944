"""Cross-entropy and perplexity of a model on held-out clips, for each codebook (MusicGen's ce_q and ppl_q)."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ssmttm.model.loss import codebook_cross_entropy
from ssmttm.text.text_batch import TextBatch

Batch = tuple[Tensor, Tensor, TextBatch]
"""Inputs and targets (batch, codebooks, steps), and the captions."""


def cross_entropy_sums(model: Callable[[Tensor, TextBatch], Tensor], batches: Iterable[Batch]) -> Tensor:
    """Return summed cross-entropy in nats and numbers of targets, (2, codebooks) float64 on the CPU.

    The model must be in evaluation mode.
    """
    totals: Tensor | None = None
    with torch.no_grad():
        for inputs, targets, text in batches:
            sums, counts = codebook_cross_entropy(model(inputs, text).float(), targets)
            both = torch.stack([sums, counts]).double().cpu()
            totals = both if totals is None else totals + both
    if totals is None:
        raise ValueError("no batches")
    return totals


def mean_losses(totals: Tensor) -> tuple[float, list[float]]:
    """Return the mean cross-entropy in nats a token, over all codebooks and of each, from sums (2, codebooks)."""
    return float(totals[0].sum() / totals[1].sum()), [float(one) for one in totals[0] / totals[1]]


def likelihood_scores(loss: float, by_codebook: Sequence[float]) -> dict[str, float]:
    """Return scores by name: ce and ppl over all codebooks, ce_K and ppl_K of codebook K.

    ppl is exp(ce); it is left out if it exceeds the largest float.
    """
    losses = {"": loss, **{f"_{book}": own for book, own in enumerate(by_codebook)}}
    largest = math.log(sys.float_info.max)
    scores = {}
    for book, own in losses.items():
        scores[f"ce{book}"] = own
        if own < largest:
            scores[f"ppl{book}"] = math.exp(own)
    return scores
