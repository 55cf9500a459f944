import math
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssmttm.model.chunks import even_chunk
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import forward_flops, parameter_count, training_flops
from ssmttm.model.layers.layer import FlopConvention
from ssmttm.model.music_lm import MusicLM
from ssmttm.text.config import TextConfig
from tests.ssmttm.small import count_parameters, small_config, text_for, tokens_for


def drawn(seed: int) -> tuple[dict[str, Any], int, int]:
    """Draw sizes of a model, frames of a clip and words of its caption."""
    chance = random.Random(seed)
    d_model, expand = chance.choice([64, 96, 128]), chance.choice([1, 2, 3])
    groups = chance.choice([groups for groups in (1, 2, 4) if expand * d_model // 16 % groups == 0])
    encoder = chance.choice(["bytes", "frozen"])
    text = TextConfig(encoder=encoder, dim=chance.choice([10, 24, 48]), patch=chance.choice([4, 8]))
    changes = {
        "n_blocks": chance.randint(1, 3),
        "d_model": d_model,
        "d_state": chance.choice([16, 40, 160, 300]),
        "n_groups": groups,
        "ssm_head_dim": 16,
        "expand": expand,
        "d_conv": chance.randint(2, 5),
        "ff_mult": chance.choice([1, 2, 4]),
        "n_codebooks": chance.randint(1, 4),
        "codebook_size": chance.choice([40, 256]),
        "text": text,
    }
    return changes, chance.randint(20, 260), chance.randint(1, 40)


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.verify) for seed in range(3, 40))]
)
def test_parameters_and_operations_equal_those_of_a_built_model(architecture, seed):
    changes, frames, words = drawn(seed)
    config = small_config(architecture, **changes)
    model = MusicLM(config).eval()
    counted = parameter_count(config)
    assert counted == count_parameters(model)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert counted.n_params + counted.text_encoder + counted.null_condition == everything
    tables = 2 * config.n_codebooks * config.vocabulary * config.d_model
    assert counted.non_embedding == counted.n_params - tables
    steps = frames + config.n_codebooks - 1
    text = text_for(config, [" ".join(["piano"] * words)] * 2)
    positions = text.mask.shape[1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_for(config, 2, steps), text)

    length = steps + (positions if architecture.has_prefix else 0)
    chunk = even_chunk(config.d_state, length)
    padded = chunk * math.ceil(length / chunk) / length
    count = forward_flops(config, frames, positions, FlopConvention(attention="full", scan_chunk=chunk))
    # The counter sees only matrix products, not the shifted products of the convolution.
    blocks = config.n_blocks * architecture.sub_layers.count("mamba2")
    mixed = config.d_inner + 2 * config.n_groups * config.d_state
    unseen = blocks * 2 * config.d_conv * mixed * length / frames
    expected = count.forward + count.text_encoder - unseen + count.layers.get("scan", 0.0) * (padded - 1)
    assert counter.get_total_flops() / (2 * frames) == pytest.approx(expected, rel=0.01)


def test_causal_attention_counts_half_of_full_attention():
    config = small_config("cross_transformer")
    causal = forward_flops(config, 1000, 8)
    full = forward_flops(config, 1000, 8, FlopConvention(attention="full"))
    projections = config.n_blocks * 8 * config.d_model**2
    half, whole = (count.layers["attention"] - projections for count in (causal, full))
    assert half / whole == pytest.approx(0.5, abs=1e-3)
    assert causal.layers["cross_attention"] == full.layers["cross_attention"]


def test_training_is_three_forward_passes_without_the_text_encoder(architecture):
    config = small_config(architecture)
    count = forward_flops(config, 100, 8)
    assert count.text_encoder > 0
    assert count.forward == pytest.approx(sum(count.layers.values()) + count.head + count.text_projection)
    assert training_flops(config, 100, 8) == pytest.approx(3 * count.forward)


PUBLISHED = TextConfig(encoder="frozen", dim=768)
"""Flan-T5 base, the paper's encoder."""


def published(architecture, n_blocks=24, **changes):
    return ModelConfig(architecture=architecture, n_blocks=n_blocks, d_model=1024, text=PUBLISHED, **changes)


@pytest.mark.parametrize(
    ("config", "n_params"),
    [
        (published("prefix_simba"), 281_042_176),  # as the reference code
        (published("prefix_simba", 6), 72_427_072),
        (published("prefix_mamba"), 180_280_576),
        (published("cross_simba"), 381_730_048),
        (published("cross_transformer"), 305_026_048),
        (published("cross_transformer", ff_mult=4), 405_738_496),
    ],
)
def test_published_sizes_are_exact_when_counted_and_when_built(config, n_params):
    count = parameter_count(config)
    assert (count.n_params, count.null_condition, count.text_encoder) == (n_params, 768, 0)
    with torch.device("meta"):
        assert count_parameters(MusicLM(config)) == count


def test_six_n_would_undercount_a_large_state():
    config = published("prefix_simba")
    assert 6 * parameter_count(config).n_params == pytest.approx(1.686e9, rel=1e-3)
    assert training_flops(config, 2588, 0) == pytest.approx(2.070e9, rel=1e-3)


def test_every_convention_has_a_name():
    config = published("prefix_simba")
    frames, positions = 2588, 64
    charged = forward_flops(config, frames, positions)
    spared = forward_flops(config, frames, positions, FlopConvention(prefix=False))
    assert charged.layers["mixer"] / spared.layers["mixer"] == pytest.approx((frames + positions) / frames)
    assert (charged.head, charged.text_projection) == (spared.head, spared.text_projection)
    smaller = forward_flops(config, frames, positions, FlopConvention(scan_chunk=64))
    assert smaller.layers["scan"] < charged.layers["scan"]
    assert smaller.layers["mixer"] == charged.layers["mixer"]


def test_counting_needs_no_torch():
    program = "import sys, ssmttm.model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
