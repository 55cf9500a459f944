import pytest
import torch
from torch.nn import functional as F

from ssmttm.compat import tame_torchaudio
from ssmttm.model.blocks import RMSNorm
from ssmttm.model.conv import causal_conv_silu
from ssmttm.model.dropout import Dropout
from ssmttm.model.layers.cross_attention import CrossAttention
from ssmttm.model.layers.mamba2 import Mamba2Mixer
from ssmttm.model.layers.sub_layer import Context
from tests.ssmttm.small import small_config


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reference_mixer(config):
    """Return the mixer of transformers, whose torch path needs no kernels."""
    tame_torchaudio()
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Reference

    settings = Mamba2Config(
        hidden_size=config.d_model, state_size=config.d_state, conv_kernel=config.d_conv, expand=config.expand,
        head_dim=config.ssm_head_dim, num_heads=config.n_ssm_heads, n_groups=config.n_groups, chunk_size=16,
        layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True,
    )  # fmt: skip
    return Reference(settings, layer_idx=0)


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ({}, 48),
        ({"n_groups": 2}, 37),
        ({"d_model": 64, "d_state": 64, "ssm_head_dim": 64}, 130),
        ({"expand": 3, "d_conv": 3, "d_state": 7}, 9),
        ({"d_state": 128, "n_groups": 4}, 2),
    ],
)
def test_the_mixer_equals_the_reference_under_the_same_state_dict(sizes, length):
    config = small_config("prefix_mamba", **sizes)
    ours, theirs = Mamba2Mixer(config), reference_mixer(config)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, length, config.d_model)
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    our_y, their_y = ours(our_x, Context()), theirs(their_x)
    torch.testing.assert_close(our_y, their_y, atol=1e-5, rtol=1e-5)

    upstream = torch.randn_like(our_y)
    our_y.backward(upstream)
    their_y.backward(upstream)
    torch.testing.assert_close(our_x.grad, their_x.grad, atol=1e-4, rtol=1e-4)
    for name, parameter in theirs.named_parameters():
        found = ours.get_parameter(name).grad
        torch.testing.assert_close(
            found, parameter.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_mixer_starts_with_the_values_of_mamba():
    mixer = Mamba2Mixer(small_config("prefix_mamba", d_model=512))
    step = F.softplus(mixer.dt_bias)
    assert 1e-3 * 0.999 <= step.min() < 3e-3
    assert 3e-2 < step.max() <= 1e-1 * 1.001
    assert 1 <= mixer.A_log.exp().min() < 4
    assert 13 < mixer.A_log.exp().max() <= 16


@pytest.mark.parametrize(("length", "taps"), [(9, 4), (2, 4), (1, 2), (30, 3)])
def test_the_convolution_equals_that_of_torch(length, taps):
    x = torch.randn(2, length, 6, requires_grad=True)
    weight, bias = torch.randn(6, 1, taps, requires_grad=True), torch.randn(6, requires_grad=True)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight, bias, groups=6)
    expected = F.silu(expected.transpose(1, 2))
    got = causal_conv_silu(x, weight, bias)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    ours = torch.autograd.grad(got, [x, weight, bias], upstream)
    theirs = torch.autograd.grad(expected, [x, weight, bias], upstream)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)


def test_rms_norm_scales_to_unit_root_mean_square():
    x = torch.randn(5, 32) * 7
    torch.testing.assert_close(RMSNorm(32)(x).pow(2).mean(-1).sqrt(), torch.ones(5), atol=1e-4, rtol=0)


def test_cross_attention_ignores_masked_text():
    attention = CrossAttention(small_config("cross_transformer"))
    x, memory = torch.randn(1, 5, 32), torch.randn(1, 6, 32)
    mask = torch.tensor([False, False, True, True, False, True])
    got = attention(x, Context(memory=memory, memory_mask=mask[None, None, None]))
    kept = memory[:, mask]
    everything = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    torch.testing.assert_close(got, attention(x, Context(memory=kept, memory_mask=everything)))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.75])
def test_dropout_drops_its_share_and_keeps_the_expectation(p):
    x = torch.ones(401, 499, requires_grad=True)
    y = Dropout(p)(x)
    share = (y == 0).float().mean().item()
    assert share == pytest.approx(p, abs=5e-3)  # ten standard deviations of a share of 200 000
    assert y.mean().item() == pytest.approx(1, abs=2e-2)
    assert y.unique().numel() == 2
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_dropout_repeats_under_the_same_seed_and_neighbours_are_independent():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(Dropout(0.5)(torch.ones(40_000)) > 0)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    for lag in (1, 2, 3, 4, 8):
        same = (draws[0][lag:] == draws[0][:-lag]).float().mean().item()
        assert same == pytest.approx(0.5, abs=0.02)


def test_dropout_does_nothing_in_evaluation():
    x = torch.randn(10)
    assert Dropout(0.5).eval()(x) is x
