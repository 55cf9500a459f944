"""Tensors that autograd keeps of a forward pass on CUDA, counted without a GPU: on torch's meta device, and on the CPU
for compiled blocks.

The stand-ins keep what the kernels of CUDA keep for their backward passes: mamba-ssm's (2.3:
MambaSplitConv1dScanCombinedFn) and torch's flash attention, fused norm and dropout. The rest is torch's own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.plan.memory import activation_bytes, how_computed
from harness.study.run import Precision
from ssmttm.model import kernels
from ssmttm.model.architecture import ARCHITECTURES
from ssmttm.model.blocks import Block
from ssmttm.model.layers.sub_layer import Context
from ssmttm.model.loss import codebook_cross_entropy
from ssmttm.model.music_lm import MusicLM
from ssmttm.text.text_batch import TextBatch
from tests.harness.plan.runs import made_run
from tests.ssmttm.kernel_devices import using

MICRO_BATCH, FRAMES, POSITIONS = 2, 512, 16


class Keeps(torch.autograd.Function):
    """Keep tensors, and with them the output, which has the shape of the first."""

    @staticmethod
    def forward(ctx: Any, with_output: bool, like: Tensor, *kept: Tensor) -> Tensor:
        output = torch.empty_like(like)
        ctx.save_for_backward(*kept, *([output] if with_output else []))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # type: ignore[override]
        raise NotImplementedError


def mixer(projected: Tensor, *weights: Any, headdim: int, **_: Any) -> Tensor:
    """Keep the projection, the scan's output and the norm's reciprocal sizes."""
    scanned = projected.new_empty(*projected.shape[:2], weights[3].shape[0] * headdim)
    return Keeps.apply(False, scanned, projected, scanned, projected.new_empty(projected.shape[:2]))


def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Keep queries, keys, values, the output and a logarithm for each row."""
    return Keeps.apply(True, q, q, k, v, q.new_empty(q.shape[:3]))


def rms_norm(x: Tensor, *_: Any) -> Tensor:
    """Keep the input and the reciprocal of its size."""
    return Keeps.apply(False, x, x, x.new_empty(x.shape[:-1]))


def dropout(x: Tensor, _: float) -> Tensor:
    """Keep a byte an element."""
    return Keeps.apply(False, x, x.new_empty(x.shape, dtype=torch.bool))


def saved_bytes(model: MusicLM) -> int:
    """Count the bytes of storages that a forward pass on the meta device keeps, without those of parameters."""
    ours = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (key := tensor.untyped_storage()._cdata) not in ours:
            kept[key] = tensor
        return tensor

    codebooks = model.config.n_codebooks
    tokens = torch.zeros(MICRO_BATCH, codebooks, FRAMES + codebooks - 1, dtype=torch.int64, device="meta")
    text = TextBatch(
        torch.zeros(MICRO_BATCH, POSITIONS, model.config.text.dim, device="meta"),
        torch.ones(MICRO_BATCH, POSITIONS, dtype=torch.bool, device="meta"),
        torch.zeros(MICRO_BATCH, dtype=torch.bool, device="meta"),
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        codebook_cross_entropy(model(tokens, text), tokens, 0.1)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_planned_activations_are_those_that_autograd_keeps(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "chosen", lambda: kernels.Kernels(device="meta", mixer=mixer))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(F, "rms_norm", rms_norm)
    monkeypatch.setattr(F, "dropout", dropout)
    text = {"encoder": "frozen", "dim": 32, "max_positions": POSITIONS}
    sizes = {"n_blocks": 24, "d_model": 256, "d_state": 64, "codebook_size": 64, "n_codebooks": 1}
    config = made_run({"architecture": architecture, "text": text, **sizes}, frames=FRAMES).model
    with torch.device("meta"):
        kept = saved_bytes(MusicLM(config))
    how = how_computed(Precision.FP32, on_cuda=True)
    assert activation_bytes(config, FRAMES, MICRO_BATCH, how=how) == pytest.approx(kept, rel=0.1)


class MixerFunction:
    """Keeps what mamba-ssm's function keeps."""

    @staticmethod
    def forward(context: Any, projected: Tensor, *arguments: Any) -> Tensor:
        taps, bias, steps, A, D = arguments[:5]
        norm, head_dim = arguments[11], arguments[15]
        scanned = projected.new_empty(*projected.shape[:2], len(steps), head_dim)
        sizes = projected.new_empty(projected.shape[:2].numel(), dtype=torch.float32)
        context.save_for_backward(
            *(projected, taps, bias, scanned, A, D, steps, None, None, norm, sizes, None, None)
        )
        return projected.new_empty(*projected.shape[:2], len(norm))


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP32])
@pytest.mark.parametrize("architecture", ["cross_simba", "cross_transformer"])
def test_a_compiled_block_keeps_the_planned_activations_too(
    architecture: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DeepSpeed puts a function of its own here when a test of this process trains under ZeRO 3.
    monkeypatch.setattr("torch.nn.functional.linear", torch._C._nn.linear)
    text = {"encoder": "frozen", "dim": 32, "max_positions": POSITIONS}
    sizes = {"n_blocks": 2, "d_model": 256, "d_state": 64, "codebook_size": 64}
    config = made_run({"architecture": architecture, "text": text, **sizes}, frames=FRAMES).model
    block, x = Block(config), torch.randn(MICRO_BATCH, FRAMES, config.d_model, requires_grad=True)
    memory, real = (
        torch.randn(MICRO_BATCH, POSITIONS, config.d_model),
        torch.ones(MICRO_BATCH, 1, 1, POSITIONS) > 0,
    )
    weights = {tuple(parameter.shape) for parameter in block.parameters()}
    torch.compiler.reset()  # other tests' lengths would have it compile for any
    # Inductor's own choice of what is kept and what is computed again, without the code it generates.
    block.compile(backend="aot_eager_decomp_partition")
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in weights:  # nor their bf16 copies, which the plan counts apart
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    fused = kernels.Kernels(device="cpu", mixer=mixer, mixer_function=MixerFunction)
    with (
        using(fused),
        torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.BF16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        block(x.clone(), Context(memory=memory, memory_mask=real))
    torch.compiler.reset()
    how = how_computed(precision, on_cuda=True)
    twice, once = (
        activation_bytes(config.model_copy(update={"n_blocks": n}), FRAMES, MICRO_BATCH, how=how)
        for n in (2, 1)
    )
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert twice - once == pytest.approx(found, rel=0.1)
