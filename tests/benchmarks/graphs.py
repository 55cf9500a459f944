"""Generation by CUDA graphs, against the same steps launched one by one: milliseconds a frame of models of 281 M.

Both sides do the same operations on the same memory, so that their tokens must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor

from ssmttm.generation import Sampling, generate
from ssmttm.model import repetition
from ssmttm.model.architecture import ARCHITECTURES, Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.model.music_lm import MusicLM
from ssmttm.text.config import TextConfig
from ssmttm.text.text_batch import TextBatch
from tests.benchmarks.measure import Row, by_turns, times

TEXT_WIDTH = 768


@dataclass(frozen=True)
class Size:
    """Size of the models and of a piece."""

    blocks: Mapping[str, int] = field(
        default_factory=lambda: {
            "prefix_mamba": 38,
            "prefix_simba": 24,
            "cross_simba": 18,
            "cross_transformer": 22,
        }
    )
    d_model: int = 1024
    d_state: int = 512
    frames: int = 2584  # 30 s
    text_positions: int = 64
    batches: tuple[int, ...] = (1, 16)


def run(*, quick: bool) -> Iterator[Row]:
    """Yield all rows on the GPU, or one that says there is none."""
    if not torch.cuda.is_available():
        yield Row("graphs: skipped, since there is no CUDA device here", "", "", "")
        return
    yield from measure(Size(frames=600 if quick else 2584), "cuda", rounds=1 if quick else 3)


def measure(size: Size, device: str, *, rounds: int) -> Iterator[Row]:
    """Yield the seconds a frame of both sides for every backbone and batch, under guidance."""
    for architecture in ARCHITECTURES:
        model = _model(Architecture(architecture), size).to(device)
        for batch in size.batches:
            text = TextBatch(
                torch.randn(batch, size.text_positions, TEXT_WIDTH),
                torch.ones(batch, size.text_positions, dtype=torch.bool),
                torch.zeros(batch, dtype=torch.bool),
            )
            sides = _Side(model, text, size.frames), _Side(model, text, size.frames, is_launched=True)
            ours, baseline = by_turns(rounds, *sides)
            if not torch.equal(sides[0].tokens, sides[1].tokens):
                raise AssertionError(f"{architecture}: a graph draws other tokens than its steps")
            what = f"graphs: {architecture}, batch {batch}, one frame"
            yield times(what, ours / size.frames, baseline / size.frames)


@dataclass
class _Side:
    """A piece by graphs, or by launches."""

    model: MusicLM
    text: TextBatch
    frames: int
    is_launched: bool = False
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __call__(self) -> None:
        """Generate; the tokens on the CPU are there when the device has finished."""
        record = (lambda _: lambda call: call) if self.is_launched else repetition.recorder
        with patch.object(repetition, "recorder", record):
            seeds = range(self.text.mask.shape[0])
            self.tokens = generate(self.model, self.text, self.frames, Sampling(), seeds).cpu()


def _model(architecture: Architecture, size: Size) -> MusicLM:
    torch.manual_seed(0)
    return MusicLM(
        ModelConfig(
            architecture=architecture,
            n_blocks=size.blocks[architecture],
            d_model=size.d_model,
            d_state=size.d_state,
            text=TextConfig(encoder="frozen", dim=TEXT_WIDTH, max_positions=size.text_positions),
        )
    ).eval()
