"""Speed of generation with guidance."""

from __future__ import annotations

from functools import partial

import torch

from ssmttm.generation import Sampling, generate
from ssmttm.model.music_lm import MusicLM
from tests.benchmarks.measure import clocked
from tests.gpu.engines import finished
from tests.gpu.report import note
from tests.gpu.sizes import BLOCKS, DEVICE, FULL, Size


def generation(size: Size) -> None:
    """Time a frame of each backbone, alone and in a batch."""
    for architecture in BLOCKS:
        model = MusicLM(size.config(architecture)).to(DEVICE).eval()
        for batch in (1, 16):
            text, seeds = size.captions(batch), list(range(batch))
            sing = partial(finished, generate, model, text)
            sing(8, Sampling(), seeds)
            frame = clocked(partial(sing, size.generated, Sampling(), seeds)) / size.generated
            clip = frame * FULL.frames
            note(
                f"{architecture}, batch {batch}: {frame * 1e3:.2f} ms a frame, a clip of 30 s in {clip:.1f} s"
            )
        del model
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
