"""Sizes asked for in parameters or proportions become the nearest model there is, or a sentence that names it."""

import pytest

from ssmttm.errors import InputError
from ssmttm.model.architecture import Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count
from ssmttm.model.sizes import Sizing, deviation, short_count, sized_model, width_step
from ssmttm.text.config import TextConfig
from tests.ssmttm.small import ARCHITECTURES

TEXT = TextConfig(encoder="frozen", dim=768)


def sized(architecture=Architecture.PREFIX_SIMBA, n_params=None, aspect=None, tolerance=0.1, **fields):
    fields = {"architecture": architecture, "text": TEXT, **fields}
    return sized_model(fields, Sizing(n_params, aspect, tolerance), width_step(fields))


def models(architecture, widths, blocks):
    return [
        ModelConfig(architecture=architecture, text=TEXT, d_model=width, n_blocks=depth)
        for width in widths
        for depth in blocks
    ]


@pytest.mark.parametrize(
    ("architecture", "blocks"),
    [("prefix_simba", 24), ("prefix_mamba", 38), ("cross_simba", 18), ("cross_transformer", 22)],
)
def test_the_published_size_takes_the_blocks_that_match_it(architecture, blocks):
    assert sized(Architecture(architecture), n_params=281_042_176, d_model=1024).n_blocks == blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("n_params", [20e6, 72.4e6, 300e6])
def test_no_other_depth_and_no_other_width_comes_nearer(architecture, n_params):
    by_depth = sized(architecture, n_params, d_model=512)
    others = models(architecture, [512], range(1, 200))
    assert abs(deviation(by_depth, n_params)) == min(abs(deviation(model, n_params)) for model in others)
    by_width = sized(architecture, n_params, n_blocks=12, tolerance=0.5)
    others = models(architecture, range(64, 2048, 64), [12])
    assert abs(deviation(by_width, n_params)) == min(abs(deviation(model, n_params)) for model in others)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("n_params", [5e6, 20e6, 72.4e6, 281e6, 7e9])
def test_an_aspect_finds_width_and_depth_with_the_parameters_asked_for(architecture, n_params):
    model = sized(architecture, n_params, aspect=42.7)
    assert abs(deviation(model, n_params)) < 0.1
    assert 42.7 / 2 < model.d_model / model.n_blocks < 42.7 * 2
    assert model.d_model % 64 == 0


def test_the_published_model_has_its_own_aspect():
    model = sized(n_params=281_042_176, aspect=1024 / 24)
    assert (model.n_blocks, model.d_model) == (24, 1024)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_width_or_a_depth_and_an_aspect_make_one_shape_of_every_architecture(architecture):
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
        ({"n_params": 72e6}, "n_params: 72,000,000: is half of a size; add one of n_blocks, d_model, aspect"),
        ({"aspect": 40}, "aspect: 40: is half of a size; add one of n_blocks, d_model, n_params"),
        (
            {"n_params": 72e6, "d_model": 512, "n_blocks": 3},
            "two of n_blocks, d_model, n_params, aspect decide a size, and here are",
        ),
    ],
)
def test_what_makes_no_size_is_a_sentence(asked, sentence):
    with pytest.raises(InputError) as caught:
        sized(**asked)
    assert sentence in str(caught.value)


def test_the_model_that_a_refusal_names_is_taken_when_asked_for():
    with pytest.raises(InputError, match="nearest cross_transformer has 28,066,816"):
        sized(Architecture.CROSS_TRANSFORMER, n_params=33e6, d_model=1024)
    model = sized(Architecture.CROSS_TRANSFORMER, n_params=28_066_816, d_model=1024, tolerance=0.0)
    assert parameter_count(model).n_params == 28_066_816


def test_names_of_parameters_are_short():
    assert [short_count(count) for count in (72e6, 281.04e6, 1.5e9, 5e4, 500)] == [
        "72M",
        "281M",
        "1.5B",
        "50k",
        "500",
    ]
