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
from ssmttm.model.repetition import repeat
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
    with torch.inference_mode():
        drawing = _Drawing(model, text.to(device), frames, sampling, seeds)
        repeat(drawing.step, drawing.steps, device)
        drawn = undelay(drawing.tokens[1:].permute(1, 2, 0))
        if (drawn == config.special).any():  # it is never drawn unless the logits are not numbers
            raise InputError("the model's logits are not finite numbers, so no token can be drawn")
        return drawn


class _Drawing:
    """Tokens drawn step by step, in tensors that every step changes in place."""

    def __init__(
        self, model: MusicLM, text: TextBatch, frames: int, sampling: Sampling, seeds: Sequence[int]
    ) -> None:
        config, device = model.config, text.mask.device
        codes = torch.zeros(1, config.n_codebooks, frames, dtype=torch.int64, device=device)
        is_due = delay(codes, None, config.special)[1][0].T != IGNORED  # (steps, codebooks)
        self.steps = is_due.shape[0]
        # (steps, batch, codebooks), drawn on the CPU so that all devices get the same.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = [torch.rand(self.steps, config.n_codebooks, generator=g) for g in generators]
        # A draw beyond all codes takes the token after them, the special one.
        beyond = torch.where(is_due, 0.0, 2.0)[:, None]
        self._draws = torch.maximum(torch.stack(draws, dim=1).to(device), beyond).double()
        shape = (self.steps + 1, len(seeds), config.n_codebooks)
        self.tokens = torch.full(shape, config.special, device=device)
        """(steps + 1, batch, codebooks): the start, then the tokens of each step."""
        self._sampling, self._codebook_size = sampling, config.codebook_size
        self._is_guided = sampling.guidance not in {0, 1}
        self._decoder = Decoder(model, _branches(text, sampling.guidance), self.steps)

    def step(self, reach: int) -> None:
        """Draw the tokens of the next step; reach: as for `Decoder.step`."""
        index = self._decoder.index  # which the decoder advances
        tokens, draws = (each.index_select(0, index)[0] for each in (self.tokens, self._draws))
        logits = self._decoder.step(tokens.repeat(2, 1) if self._is_guided else tokens, reach)
        logits = logits.double()  # large enough for the results of extreme temperature and guidance
        if self._is_guided:
            conditional, without = logits.chunk(2)
            logits = torch.lerp(without, conditional, self._sampling.guidance)
        drawn = pick(logits[..., : self._codebook_size], draws, self._sampling)
        self.tokens.index_copy_(0, index, drawn[None])


def pick(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """Return tokens (...,) drawn from logits (..., vocabulary) with draws (...,), uniform in [0, 1).

    The inverse of the distribution function in the vocabulary's own order: logits that differ by rounding give another
    token only if a draw falls into that difference. A draw above 1, and logits that are not numbers, give `vocabulary`,
    which is no token.
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
    return torch.searchsorted(reached, (draws.double() * reached[..., -1])[..., None], right=True)[..., 0]


def _branches(text: TextBatch, guidance: float) -> TextBatch:
    """Return the rows for guidance: with the captions, without them, or both in this order."""
    if guidance == 1:
        return text
    without = text.unconditional()
    if guidance == 0:
        return without
    pairs = zip(vars(text).values(), vars(without).values(), strict=True)
    return TextBatch(*(torch.cat(pair) for pair in pairs))
