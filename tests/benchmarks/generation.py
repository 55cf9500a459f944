"""Generation with guidance step by step, against computing the whole piece again for every token.

2,200 forward passes would take an hour, so they are timed at 16 lengths and integrated between them (trapezoid). Both
sides take a caption and its unconditional twin as a batch of two, which the reference computes one after the other;
both choose the likeliest token, so that their answers can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ssmttm.generation import Sampling, generate
from ssmttm.model.architecture import Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.model.music_lm import MusicLM
from ssmttm.model.patterns import delay
from ssmttm.text.byte_encoder import collate_bytes
from ssmttm.text.config import TextConfig
from ssmttm.text.text_batch import TextBatch
from tests.benchmarks.measure import Row, as_ratio, as_time

Result = TypeVar("Result")

CASES = (
    (Architecture("prefix_simba"), 512),
    (Architecture("prefix_simba"), 64),
    (Architecture("cross_transformer"), None),
)
"""Backbones, with d_state of the paper and of most other models."""
BLOCKS, WIDTH = 2, 1024
"""The paper's width with fewer than its 24 blocks, which are all alike."""
CAPTION = "A slow piece for piano and strings in C minor, quiet at first and solemn in the end."
GREEDY = Sampling(top_k=1, guidance=3.0)


def run(*, quick: bool) -> Iterator[Row]:
    """Yield seconds and tokens a second of both, for 2,200 tokens of one caption."""
    tokens, timed = (550, 6) if quick else (2200, 16)
    for architecture, d_state in CASES:
        yield from _compare(architecture, d_state, tokens, timed)


def _compare(architecture: Architecture, d_state: int | None, tokens: int, timed: int) -> Iterator[Row]:
    torch.manual_seed(0)
    sizes = {} if d_state is None else {"d_state": d_state}
    text_config = TextConfig(dim=256)
    config = ModelConfig(architecture=architecture, n_blocks=BLOCKS, d_model=WIDTH, text=text_config, **sizes)
    model = MusicLM(config).eval()
    text = collate_bytes([CAPTION], [False], text_config)
    generate(model, text, 8, GREEDY, [0])  # warm-up
    found, ours = _timed(lambda: generate(model, text, tokens, GREEDY, [0]))

    inputs, _ = delay(found, None, config.special)  # (1, 1, tokens): the input of each token
    lengths = np.linspace(1, tokens, timed).astype(int)
    _next_token(model, text, inputs[..., : lengths[0]])
    seconds = []
    for length in lengths:
        token, spent = _timed(partial(_next_token, model, text, inputs[..., :length]))
        if token != int(found[0, 0, length - 1]):
            raise AssertionError(f"{architecture}: token {length} is another when all is computed again")
        seconds.append(spent)
    baseline = float(np.trapezoid(seconds, lengths)) + seconds[0]

    what = f"{tokens} tokens: {architecture}, {BLOCKS} x {WIDTH}" + (
        f", d_state {d_state}" if d_state else ""
    )
    yield Row(what, as_time(ours), as_time(baseline), as_ratio(baseline / ours))
    yield Row("  tokens a second", as_ratio(tokens / ours), as_ratio(tokens / baseline), "")


def _next_token(model: MusicLM, text: TextBatch, inputs: Tensor) -> int:
    """Return the likeliest next token under guidance, from the inputs (1, 1, length) alone."""
    without = text.unconditional()
    both = TextBatch(
        *(torch.cat(pair) for pair in zip(vars(text).values(), vars(without).values(), strict=True))
    )
    with torch.inference_mode():
        conditional, unconditional = model(inputs.repeat(2, 1, 1), both)[:, 0, -1]
        guided = torch.lerp(unconditional, conditional, GREEDY.guidance)
        return int(guided[: model.config.special].argmax())


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
