"""Sizes given by parameters or aspect become the nearest model, or an error that names it."""

import pytest

from ssmttm.errors import InputError
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count
from ssmttm.model.sizes import Sizing, deviation, short_count, sized_model, width_step
from ssmttm.text.config import TextConfig
from tests.ssmttm.small import ARCHITECTURES

TEXT = TextConfig(encoder="frozen", dim=768)


def sized(architecture="prefix_simba", n_params=None, aspect=None, tolerance=0.1, **fields):
    fields = {"architecture": architecture, "text": TEXT, **fields}
    return sized_model(fields, Sizing(n_params, aspect, tolerance), width_step(fields))


@pytest.mark.parametrize(
    ("architecture", "blocks"),
    [("prefix_simba", 24), ("prefix_mamba", 38), ("cross_simba", 18), ("cross_transformer", 22)],
)
def test_the_published_size_takes_the_blocks_that_match_it(architecture, blocks):
    assert sized(architecture, n_params=281_042_176, d_model=1024).n_blocks == blocks
    if architecture == "prefix_simba":  # the published one
        assert sized(n_params=281_042_176, aspect=1024 / 24).n_blocks == blocks


@pytest.mark.parametrize("n_params", [20e6, 72.4e6, 300e6])
def test_no_other_depth_or_width_is_nearer(architecture, n_params):
    for key, value, free, choices in (
        ("d_model", 512, "n_blocks", range(1, 200)),
        ("n_blocks", 12, "d_model", range(64, 2048, 64)),
    ):
        found = sized(architecture, n_params, tolerance=0.5, **{key: value})
        others = [found.model_copy(update={free: choice}) for choice in choices]
        assert abs(deviation(found, n_params)) == min(abs(deviation(model, n_params)) for model in others)


@pytest.mark.parametrize("n_params", [5e6, 20e6, 72.4e6, 281e6, 7e9])
def test_an_aspect_finds_width_and_depth_with_the_requested_parameters(architecture, n_params):
    model = sized(architecture, n_params, aspect=42.7)
    assert abs(deviation(model, n_params)) < 0.1
    assert 42.7 / 2 < model.d_model / model.n_blocks < 42.7 * 2
    assert model.d_model % 64 == 0


def test_an_aspect_with_a_width_or_a_depth_gives_every_architecture_one_shape(architecture):
    by_width = sized(architecture, d_model=768, aspect=42.7)
    by_depth = sized(architecture, n_blocks=18, aspect=42.7)
    assert (by_width.n_blocks, by_depth.d_model) == (18, 768)
    assert sized(architecture, d_model=64, aspect=1000).n_blocks == 1
    assert sized(architecture, n_blocks=1, aspect=3).d_model == 64


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        ({}, 64),
        ({"head_dim": 48}, 96),
        ({"head_dim": 16, "ssm_head_dim": 16}, 16),
        ({"n_groups": 4}, 128),
        ({"head_dim": 1, "ssm_head_dim": 1}, 2),
    ],
)
def test_widths_that_are_found_suit_every_architecture(fields, step):
    assert width_step(fields) == step
    for architecture in ARCHITECTURES:
        for steps in (1, 2, 3):
            ModelConfig(architecture=architecture, text=TEXT, n_blocks=1, d_model=steps * step, **fields)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"n_params": 3e6, "d_model": 1024},
            "n_params: 3,000,000: the nearest prefix_simba has 14,478,432 (1 block, d_model 1024), +382.6% where the "
            "tolerance is 0.1",
        ),
        (
            {"n_params": 72e6, "d_model": 1024, "tolerance": 1e-3},
            "72,427,072 (6 blocks, d_model 1024), +0.6%",
        ),
        (
            {"n_params": 72e6},
            "n_params: 72,000,000: alone does not decide a size; add one of n_blocks, d_model, aspect",
        ),
        ({"aspect": 40}, "aspect: 40: alone does not decide a size; add one of n_blocks, d_model, n_params"),
        (
            {"n_params": 72e6, "d_model": 512, "n_blocks": 3},
            "aspect decide a size, but n_blocks 3, d_model 512, n_params 72,000,000 are given; set one to null",
        ),
    ],
)
def test_wrong_sizes_are_explained(asked, sentence):
    with pytest.raises(InputError) as caught:
        sized(**asked)
    assert sentence in str(caught.value)


def test_the_model_that_an_error_names_is_accepted():
    with pytest.raises(InputError, match="nearest cross_transformer has 28,066,816"):
        sized("cross_transformer", n_params=33e6, d_model=1024)
    model = sized("cross_transformer", n_params=28_066_816, d_model=1024, tolerance=0.0)
    assert parameter_count(model).n_params == 28_066_816


def test_names_of_parameters_are_short():
    counts = {72e6: "72M", 281.04e6: "281M", 1.5e9: "1.5B", 5e4: "50k", 500: "500"}
    assert {count: short_count(count) for count in counts} == counts
