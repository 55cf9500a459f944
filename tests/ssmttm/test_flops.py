import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.config import Architecture, ModelConfig, SubLayer, TextConfig
from ssmttm.flops import FlopConvention, forward_flops, parameter_count, six_n, training_flops
from ssmttm.model import MusicLM, count_parameters
from ssmttm.ssd import preferred_chunk
from tests.ssmttm.small import ARCHITECTURES, small_config, text_for, tokens_for

VARIANTS = [
    {},
    {"n_codebooks": 4, "n_blocks": 3},
    {"d_model": 64, "n_groups": 2, "d_state": 24, "expand": 3, "d_conv": 3, "ff_mult": 4},
    {"encoder": "frozen", "codebook_size": 1024},
    {"text": TextConfig(dim=10, patch=4)},
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("changes", VARIANTS)
def test_parameters_are_counted_to_the_unit(architecture, changes):
    config = small_config(architecture, **changes)
    model = MusicLM(config)
    counted = parameter_count(config)
    assert counted == count_parameters(model)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert counted.n_params + counted.text_encoder + counted.null_condition == everything
    assert (
        counted.non_embedding
        == counted.n_params - 2 * config.n_codebooks * config.vocabulary * config.d_model
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("changes", "frames"),
    [
        ({"d_model": 64, "d_state": 32}, 192),
        ({"n_codebooks": 3, "encoder": "frozen"}, 50),
        ({"d_model": 128, "d_state": 160, "n_groups": 2, "ff_mult": 4, "text": TextConfig(dim=48)}, 230),
    ],
)
def test_operations_equal_those_torch_counts(architecture, changes, frames):
    config = small_config(architecture, **changes)
    model = MusicLM(config).eval()
    steps = frames + config.n_codebooks - 1
    text = text_for(config, ["a march for brass and drums, loud and heroic, in a major key"] * 2)
    positions = text.mask.shape[1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_for(config, 2, steps), text)

    length = steps + (positions if architecture.has_prefix else 0)
    chunk = preferred_chunk(config.d_state)
    even_chunk = -(-length // -(-length // chunk))
    padded = even_chunk * -(-length // even_chunk) / length
    count = forward_flops(config, frames, positions, FlopConvention(attention="full", scan_chunk=even_chunk))
    # The counter sees matrix products alone: not the convolution, which is made of shifted products here.
    blocks = config.n_blocks * architecture.sub_layers.count(SubLayer.MAMBA2)
    mixed = config.d_inner + 2 * config.n_groups * config.d_state
    unseen = blocks * 2 * config.d_conv * mixed * length / frames
    expected = count.forward + count.text_encoder - unseen + count.scan * (padded - 1)
    assert counter.get_total_flops() / (2 * frames) == pytest.approx(expected, rel=0.01)


def test_causal_attention_is_charged_for_half_of_what_it_sees():
    config = small_config(Architecture.CROSS_TRANSFORMER)
    causal = forward_flops(config, 1000, 8)
    full = forward_flops(config, 1000, 8, FlopConvention(attention="full"))
    projections = config.n_blocks * 8 * config.d_model**2
    assert (causal.attention - projections) / (full.attention - projections) == pytest.approx(0.5, abs=1e-3)
    assert causal.cross_attention == full.cross_attention


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_three_forward_passes_without_the_text_encoder(architecture):
    config = small_config(architecture)
    count = forward_flops(config, 100, 8)
    assert count.text_encoder > 0
    parts = count.mixer + count.scan + count.attention + count.cross_attention + count.feed_forward
    assert count.forward == pytest.approx(parts + count.head + count.text_projection)
    assert training_flops(config, 100, 8) == pytest.approx(3 * count.forward)


def test_six_n_undercounts_a_large_state():
    text = TextConfig(encoder="frozen", dim=768)
    config = ModelConfig(architecture=Architecture.PREFIX_SIMBA, n_blocks=24, d_model=1024, text=text)
    assert six_n(config) == pytest.approx(1.686e9, rel=1e-3)
    assert training_flops(config, 2588, 0) == pytest.approx(2.070e9, rel=1e-3)


def test_counting_needs_no_torch():
    program = "import sys, ssmttm.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
