"""Speed of the same models as others would write them: mamba-ssm's own module, and torch's Transformer decoder."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.model.kernels import _without_its_init
from tests.benchmarks.measure import clocked
from tests.gpu.engines import finished
from tests.gpu.report import note
from tests.gpu.sizes import DEVICE, Size

DROPOUT = 0.3
VOCABULARY = 1025


class _Simba(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        with _without_its_init("mamba_ssm"):
            from mamba_ssm.modules.mamba2 import Mamba2
        d = size.d_model
        mix = Mamba2(d_model=d, d_state=size.d_state, headdim=size.head_dim)
        self.mix = nn.Sequential(nn.RMSNorm(d), mix, nn.Dropout(DROPOUT))
        feed = (nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(2 * d, d))
        self.feed = nn.Sequential(nn.RMSNorm(d), *feed, nn.Dropout(DROPOUT))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.feed(x)


class _Reference(nn.Module):
    def __init__(self, size: Size, architecture: str) -> None:
        super().__init__()
        d, blocks = size.d_model, size.config(architecture).n_blocks
        self.prefixed = architecture == "prefix_simba"
        if self.prefixed:
            self.backbone = nn.Sequential(*(_Simba(size) for _ in range(blocks)))
        else:
            settings = {"batch_first": True, "norm_first": True}
            layer = nn.TransformerDecoderLayer(d, d // size.head_dim, 2 * d, DROPOUT, "gelu", **settings)
            self.backbone = nn.TransformerDecoder(layer, blocks)
        self.embedding, self.head = nn.Embedding(VOCABULARY, d), nn.Linear(d, VOCABULARY, bias=False)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(size.frames))

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.prefixed:
            x = self.backbone(torch.cat([text, x], 1))[:, text.shape[1] :]
        else:
            x = self.backbone(x, text, tgt_mask=self.causal, tgt_is_causal=True)
        return self.head(x)


def reference(size: Size) -> None:
    """Time both in plain PyTorch: autocast, AdamW and clipping, without DeepSpeed."""
    for architecture in ("prefix_simba", "cross_transformer"):
        try:
            model = _Reference(size, architecture).to(DEVICE)
        except ImportError as error:
            note(f"reference for {architecture}: cannot be built: {error}")
            continue
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = torch.randint(0, VOCABULARY, (size.micro_batch, size.frames), device=DEVICE)
        text = torch.randn(size.micro_batch, size.text, size.d_model, device=DEVICE)
        step = partial(finished, _step, model, optimiser, tokens, text)
        seconds = float(np.median([clocked(step) for _ in range(7)][2:]))
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        speed = f"{tokens.numel() / seconds:,.0f} tokens/s, {seconds * 1e3:.0f} ms a step"
        note(f"reference for {architecture}: {speed}, {count:.0f} M parameters")


def _step(model: nn.Module, optimiser: torch.optim.Optimizer, tokens: Tensor, text: Tensor) -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(tokens, text)
    F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), label_smoothing=0.1).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
