"""Blocks are compiled as one graph each, and what is compiled serves all of them; options of a GPU's arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmttm.model import kernels
from ssmttm.model.aligned import AlignedLinear
from ssmttm.model.architecture import ARCHITECTURES
from ssmttm.model.blocks import Block
from ssmttm.model.config import ModelConfig
from ssmttm.model.layers.sub_layer import Context
from tests.ssmttm.kernel_devices import kernels_on, using
from tests.ssmttm.small import small_config, small_model, text_for, tokens_for


@pytest.fixture(autouse=True)
def _uncompiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def context_for(config: ModelConfig, length: int, positions: int = 5) -> Context:
    if config.architecture.has_prefix:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, :3] = False
        return Context(mask=mask)
    memory = torch.randn(2, positions, config.d_model)
    return Context(memory=memory, memory_mask=torch.ones(2, 1, 1, positions, dtype=torch.bool))


def gradients(block: torch.nn.Module, config: ModelConfig, length: int) -> list[Tensor]:
    torch.manual_seed(1)
    x, context = torch.randn(2, length, config.d_model, requires_grad=True), context_for(config, length)
    y = block(x, context)
    if context.mask is not None:
        y = y * context.mask[..., None]  # outputs at masked positions are undefined
    return [y, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))]


@pytest.mark.parametrize(
    ("architecture", "lengths"),
    [
        *((architecture, (24,)) for architecture in ARCHITECTURES),
        ("cross_transformer", (24, 25)),
        *(pytest.param(a, (24, 25), marks=pytest.mark.verify) for a in ARCHITECTURES if a.is_recurrent),
    ],
)
def test_a_block_is_one_graph_at_any_length_with_the_same_gradients(
    architecture: str, lengths: tuple[int, ...]
) -> None:
    config = small_config(architecture, dropout=0.0, n_blocks=1)
    block = Block(config)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)  # raises where the graph would break
    for length in lengths:
        torch.testing.assert_close(gradients(compiled, config, length), gradients(block, config, length))


@pytest.mark.verify
def test_a_block_with_mamba_ssms_kernels_is_one_graph_with_the_same_gradients() -> None:
    config = small_config("prefix_simba", dropout=0.0, n_groups=2)
    block = Block(config)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with kernels_on("cpu") as found, using(found):
        assert all(map(torch.equal, gradients(compiled, config, 37), gradients(block, config, 37)))


def test_a_mamba_ssm_that_keeps_other_tensors_is_not_believed() -> None:
    class Function:
        @staticmethod
        def forward(context, projected, *arguments):
            context.save_for_backward(projected)
            return projected

    block = torch.compile(Block(small_config("prefix_mamba")), backend="aot_eager")
    other = kernels.Kernels(device="cpu", mixer=lambda: None, mixer_function=Function)
    with using(other), pytest.raises(RuntimeError, match="keeps other tensors"):
        block(torch.randn(2, 9, 32), Context())


def test_compiled_blocks_share_their_code_and_leave_the_names_of_weights() -> None:
    config = small_config("cross_transformer", n_blocks=3)
    model, text = small_model(config), text_for(config, ["calm piano", "x"])
    names = list(model.state_dict())
    expected = model(tokens_for(config, 2, 20), text)
    torch._dynamo.utils.counters.clear()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(model(tokens_for(config, 2, 20), text), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("architecture", ["prefix_simba", "cross_transformer"])
def test_a_bf16_residual_stream_is_used_under_autocast_alone(architecture: str) -> None:
    config = small_config(architecture)
    rounded = config.model_copy(update={"residual": "bf16"})
    model, other = small_model(config), small_model(rounded)
    tokens, text = tokens_for(config, 2, 20), text_for(config, ["calm piano", "x"])
    assert torch.equal(model(tokens, text), other(tokens, text))
    seen = []
    other.blocks[-1].register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        near, stream = model(tokens, text), other(tokens, text)
    assert seen == [torch.bfloat16]
    assert not torch.equal(near, stream)
    torch.testing.assert_close(near, stream, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("rows", "stride"), [(1025, 1088), (2572, 2624), (5152, 5152)])
def test_rows_of_a_product_are_aligned_on_a_gpu_and_weights_keep_their_shape(rows: int, stride: int) -> None:
    with torch.device("meta"):
        layer = AlignedLinear(16, rows)
        y = layer(torch.empty(2, 3, 16))
    y.sum().backward()
    assert (y.shape, y.stride()) == ((2, 3, rows), (3 * stride, stride, 1))
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == layer.weight.shape == (rows, 16)
    assert list(layer.state_dict()) == ["weight"]


def test_the_padded_product_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = AlignedLinear(16, 13), torch.randn(4, 16)
    expected = layer(x)
    monkeypatch.setattr(
        Tensor, "device", property(lambda _: torch.device("cuda"))
    )  # of what the layer asks alone
    torch.testing.assert_close(layer(x), expected)
