"""MusicLM: a language model of music tokens given a caption, on any backbone.

    tokens, text -> embeddings, text memory -> blocks -> logits

A prefix model puts the text in front of the music in one sequence; a cross model attends to it from every block. After
arXiv 2601.14786, except that text masks and dropped captions reach every backbone.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssmttm.model.aligned import AlignedLinear
from ssmttm.model.blocks import Block, Residual
from ssmttm.model.config import ModelConfig
from ssmttm.model.layers.sub_layer import Context
from ssmttm.text.byte_encoder import ByteEncoder
from ssmttm.text.text_batch import TextBatch


class MusicLM(nn.Module):
    """A language model of delayed music tokens given a caption."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, entries = config.d_model, config.n_codebooks * config.vocabulary
        self.text_encoder = ByteEncoder(config.text) if config.text.encoder == "bytes" else None
        self.null_condition = nn.Parameter(torch.randn(config.text.dim) * 0.02)
        self.text_projection = nn.Linear(config.text.dim, d)
        self.text_norm = nn.LayerNorm(d)
        # One table and one matrix for all codebooks: codebook k's entries start at k * vocabulary.
        self.embedding = nn.Embedding(entries, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.head = AlignedLinear(d, entries)
        self.checkpoints_activations = False
        """True to keep only the inputs of blocks, and compute them again, dropout included, in the backward pass."""
        self._initialise()

    def forward(self, tokens: Tensor, text: TextBatch) -> Tensor:
        """Return logits (batch, codebooks, steps, vocabulary).

        tokens: (batch, codebooks, steps) int64, the inputs `patterns.delay` makes.
        """
        steps = tokens.shape[2]
        memory, memory_mask = self.read_text(text)  # (batch, positions, d_model), (batch, positions)
        x = self.embed(tokens)  # (batch, steps, d_model)
        if self.config.architecture.has_prefix:
            x = torch.cat([memory, x], dim=1)  # (batch, positions + steps, d_model)
            mask = torch.cat([memory_mask, memory_mask.new_ones(1, 1).expand(x.shape[0], steps)], dim=1)
            x = x + sinusoids(positions_from_first(mask), x)
            context = Context(mask=mask)
        else:
            x = x + sinusoids(torch.arange(steps, device=x.device), x)
            memory = memory + sinusoids(positions_from_first(memory_mask), memory)
            context = Context(memory=memory, memory_mask=memory_mask[:, None, None])
        if self.config.residual == "bf16" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.bfloat16)
        for block in self.blocks:
            if self.checkpoints_activations:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        logits = self.head(x[:, -steps:])  # (batch, steps, codebooks * vocabulary)
        return torch.unflatten(logits, -1, (self.config.n_codebooks, -1)).transpose(1, 2)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the sum of the codebooks' embeddings, (batch, steps, d_model)."""
        if self.config.n_codebooks == 1:
            return self.embedding(tokens[:, 0])  # type: ignore[no-any-return]
        first = torch.arange(self.config.n_codebooks, device=tokens.device) * self.config.vocabulary
        return self.embedding(tokens + first[:, None]).sum(1)  # type: ignore[no-any-return]

    def read_text(self, text: TextBatch) -> tuple[Tensor, Tensor]:
        """Return the projected text (batch, positions, d_model), and the mask of its real positions."""
        values = text.values if self.text_encoder is None else self.text_encoder(text.values)
        # A row without text has one real position, its last, which holds the learned null condition.
        dropped = text.dropped | ~text.mask.any(1)
        values = torch.where(
            dropped[:, None, None], self.null_condition, values.to(self.null_condition.dtype)
        )
        last = torch.arange(values.shape[1], device=values.device) == values.shape[1] - 1
        mask = torch.where(dropped[:, None], last, text.mask)
        return self.text_norm(self.text_projection(values)), mask

    def _initialise(self) -> None:
        """Start residual branches small, as mamba_ssm does, and the loss near ln(vocabulary)."""
        residuals = [module for module in self.blocks.modules() if isinstance(module, Residual)]
        for residual in residuals:
            residual.layer.initialise(len(residuals))
        nn.init.normal_(self.head.weight, std=1 / self.config.d_model)


def positions_from_first(mask: Tensor) -> Tensor:
    """Return each position's index (batch, length), counted from the row's first real one; 0 for padding."""
    first = mask.to(torch.uint8).argmax(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)


def sinusoids(positions: Tensor, like: Tensor) -> Tensor:
    """Return sinusoidal encodings (..., d_model) of positions (...,) (arXiv 1706.03762, section 3.5)."""
    capacity = 1 << max(8, (positions.shape[-1] - 1).bit_length())
    # Never built in inference mode: the cache outlives it, and autograd refuses inference tensors.
    with torch.inference_mode(False):
        table = _sinusoid_table(capacity, like.shape[-1], like.device, like.dtype)
    return F.embedding(positions, table)


@lru_cache(maxsize=16)
def _sinusoid_table(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(device, dtype)


def weight_decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters with and those without weight decay.

    Vectors have none: biases, norms, A_log, D, dt_bias and the null condition.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
