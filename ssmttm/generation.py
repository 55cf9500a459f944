"""Generate music from a caption: draw tokens one step at a time, with or without classifier-free guidance.

Guidance ("Classifier-Free Diffusion Guidance", arXiv 2207.12598; for music tokens arXiv 2306.05284, section 3.4)
moves the logits away from those without a caption: uncond + guidance * (cond - uncond). Both sides are rows of one
batch, so that a step reads the model's weights once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmttm.errors import InputError
from ssmttm.model.music_lm import MusicLM
from ssmttm.model.patterns import IGNORED, delay, undelay
from ssmttm.model.stepping import Decoder
from ssmttm.text.text_batch import TextBatch


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling; the defaults are MusicGen's. Raises InputError for a value out of range."""

    temperature: float = 1.0
    """Divisor of the logits, above 0."""
    top_k: int | None = 250
    """Draw from this many of the likeliest tokens only; None takes all."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability only; None takes all."""
    guidance: float = 3.0
    """Weight of the caption: 0 ignores it, 1 gives the model's own distribution, more exaggerates it."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}: choose one above 0, such as 1.0")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}: choose 1 or more tokens to draw from, such as 250")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: choose a probability above 0 and up to 1, such as 0.95")
        if not 0 <= self.guidance < float("inf"):
            raise InputError(f"guidance is {self.guidance}: choose 0 or more, such as 3.0")


def generate(
    model: MusicLM, text: TextBatch, frames: int, sampling: Sampling, seeds: Sequence[int]
) -> Tensor:
    """Return codes (batch, codebooks, frames) int64 in time order, on the model's device, with a row for each caption.

    seeds: one for each row, so that the draws of a row do not depend on its neighbours and a longer piece begins like a
    shorter one; the logits of a row depend on its neighbours by rounding only. The model must be in evaluation mode.
    """
    config, batch = model.config, text.mask.shape[0]
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} captions")
    if frames < 1:
        raise InputError(f"frames is {frames}: generate 1 or more")
    device = model.null_condition.device
    codes = torch.zeros(1, config.n_codebooks, frames, dtype=torch.int64, device=device)
    is_due = delay(codes, None, config.special)[1][0] != IGNORED  # (codebooks, steps)
    steps = is_due.shape[1]
    with torch.inference_mode():
        # (steps, batch, codebooks), drawn on the CPU so that all devices get the same.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = torch.stack(
            [torch.rand(steps, config.n_codebooks, generator=g) for g in generators], dim=1
        ).to(device)
        decoder = Decoder(model, _branches(text.to(device), sampling.guidance), steps)
        special = torch.full((batch, config.n_codebooks), config.special, device=device)
        written, tokens = [], special
        for step in range(steps):
            logits = decoder.step(tokens if sampling.guidance in {0, 1} else tokens.repeat(2, 1))
            logits = logits.double()  # large enough for the results of extreme temperature and guidance
            if sampling.guidance not in {0, 1}:
                conditional, without = logits.chunk(2)
                logits = torch.lerp(without, conditional, sampling.guidance)
            logits[..., config.special] = -torch.inf
            tokens = torch.where(is_due[:, step], pick(logits, draws[step], sampling), special)
            written.append(tokens)
        drawn = undelay(torch.stack(written, dim=2))
        if (drawn == config.special).any():  # its probability is 0 unless the logits are not numbers
            raise InputError("the model's logits are not finite numbers, so no token can be drawn")
        return drawn


def pick(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """Return tokens (...,) drawn from logits (..., vocabulary) with draws (...,), uniform in [0, 1).

    The inverse of the distribution function in the vocabulary's own order: logits that differ by rounding give another
    token only if a draw falls into that difference. Logits that are not numbers give the last token.
    """
    logits = logits.double()
    # The largest logit is 0 and stays 0 at any temperature.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        lowest = logits.topk(sampling.top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        beyond = ranked.cumsum(-1) - ranked >= sampling.top_p
        probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0)
    # In float64 a draw, a multiple of 2^-24, times the sum is below the sum: no token of probability 0 is reached.
    reached = probabilities.cumsum(-1)
    drawn = torch.searchsorted(reached, (draws.double() * reached[..., -1])[..., None], right=True)[..., 0]
    return drawn.clamp(max=logits.shape[-1] - 1)


def _branches(text: TextBatch, guidance: float) -> TextBatch:
    """Return the rows for guidance: with the captions, without them, or both in this order."""
    if guidance == 1:
        return text
    without = text.unconditional()
    if guidance == 0:
        return without
    pairs = zip(vars(text).values(), vars(without).values(), strict=True)
    return TextBatch(*(torch.cat(pair) for pair in pairs))
