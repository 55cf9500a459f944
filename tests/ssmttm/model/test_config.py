import pytest
from pydantic import ValidationError

from ssmttm.model.config import ModelConfig
from ssmttm.text.config import TextConfig

TEXT = TextConfig(dim=64)


def config(architecture="cross_simba", **changes):
    fields = {"architecture": architecture, "n_blocks": 2, "d_model": 128, "text": TEXT}
    return ModelConfig(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"d_model": 100}, "d_model 100 does not divide into heads of 64: choose a multiple of 64"),
        (
            {"architecture": "prefix_simba", "d_model": 80},
            "expand * d_model 160 does not divide into heads of 64: choose a d_model with 2 * d_model a multiple of 64",
        ),
        (
            {"n_groups": 3},
            "n_groups 3 does not divide the 4 heads of the scan (expand * d_model / ssm_head_dim): "
            "choose a divisor of 4",
        ),
        ({"d_model": 65, "head_dim": 65}, "d_model 65 is odd: sinusoidal positions need an even d_model"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_by_key_and_value(changes, sentence):
    with pytest.raises(ValidationError) as caught:
        config(**changes)
    assert sentence in str(caught.value)


def test_keys_of_unused_layers_are_not_checked():
    assert config("prefix_mamba", d_model=96).n_ssm_heads == 3
    assert config("cross_transformer", d_model=64, ssm_head_dim=48).d_model == 64


@pytest.mark.parametrize(
    "changes",
    [{"n_blocks": 0}, {"dropout": 1.0}, {"architecture": "mamba3"}, {"chunk_size": 64}, {"d_state": 0}],
)
def test_values_out_of_range_and_unknown_keys_are_refused(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        config(**changes)


def test_text_needs_whole_half_patches():
    with pytest.raises(ValidationError, match="patch 7 is odd"):
        TextConfig(dim=8, patch=7)
