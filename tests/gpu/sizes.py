"""Sizes of the check, and what was predicted for them before anything ran on a GPU.

The predictions are a roofline over the operations of the code as it stood then, for one H200: products at 62 % of the
peak, memory at 70 to 75 % of its bandwidth, the scan at 30 % of the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.study.run import Optimiser, Precision, Run
from ssmttm.model.architecture import Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.text.config import TextConfig
from ssmttm.text.text_batch import TextBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT_WIDTH = 768
BLOCKS = {"prefix_mamba": 38, "prefix_simba": 24, "cross_simba": 18, "cross_transformer": 22}
"""Blocks with which each backbone has 281 M parameters."""
PREDICTED_FOR = "H200"
TOKENS_PER_SECOND = {
    "prefix_mamba": 101_000,
    "prefix_simba": 122_000,
    "cross_simba": 149_000,
    "cross_transformer": 183_000,
}
PEAK_GIB = {"prefix_mamba": 26.2, "prefix_simba": 26.9, "cross_simba": 24.8, "cross_transformer": 25.5}
CHECKPOINTED_PEAK_GIB = 8.3
"""Of Prefix SiMBA with activation checkpointing."""
TOLERANCE = 0.3
"""A larger deviation is a finding about the prediction or about the code."""


@dataclass(frozen=True)
class Size:
    """Sizes of what the phases train and generate."""

    blocks: int | None = None
    """Blocks of every backbone; None for those of 281 M."""
    d_model: int = 1024
    d_state: int = 512
    head_dim: int = 64
    frames: int = 2584  # 30 s
    text: int = 128
    micro_batch: int = 8
    product: int = 8192
    """Rows of the matrix product that tells the ceiling."""
    generated: int = 200
    study_frames: int = 256

    def config(self, architecture: str, blocks: int | None = None) -> ModelConfig:
        """Return the model of a backbone that reads a frozen encoder's text."""
        return ModelConfig(
            architecture=Architecture(architecture),
            n_blocks=blocks or self.blocks or BLOCKS[architecture],
            d_model=self.d_model,
            d_state=self.d_state,
            ssm_head_dim=self.head_dim,
            head_dim=self.head_dim,
            text=TextConfig(encoder="frozen", dim=TEXT_WIDTH, max_positions=self.text),
        )

    def run(self, config: ModelConfig, accumulation: int) -> Run:
        """Return a Run of a model on a corpus that does not exist."""
        return Run(
            model=config,
            corpus="0" * 64,
            text_encoder="0" * 64,
            frames=self.frames,
            batch=self.micro_batch * accumulation,
            iterations=9,
            precision=Precision.BF16,
            optimiser=Optimiser(lr=1e-4, grad_clip=1.0),
        )

    def captions(self, batch: int) -> TextBatch:
        """Return random embeddings; every second caption is half as long."""
        lengths = torch.tensor([self.text, self.text // 2]).repeat(batch)[:batch]
        mask = torch.arange(self.text) >= self.text - lengths[:, None]
        values = torch.randn(batch, self.text, TEXT_WIDTH)
        return TextBatch(values, mask, torch.zeros(batch, dtype=torch.bool)).to(DEVICE)


FULL = Size()
TINY = Size(2, 64, 16, 16, frames=60, text=8, micro_batch=2, product=256, generated=20, study_frames=50)
