"""A layer from outside the package: one file and one registration add it to plans, training and generation."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.plan.memory import activation_bytes
from ssmttm.model.architecture import ARCHITECTURES, register_architecture
from ssmttm.model.flops import forward_flops, parameter_count
from ssmttm.model.layers.layer import LAYERS, register
from ssmttm.model.music_lm import MusicLM
from tests.harness.trainer import losses, train
from tests.ssmttm.model.toy_layer import RunningMean
from tests.ssmttm.small import (
    CAPTIONS,
    count_parameters,
    logits_by_steps,
    small_config,
    small_model,
    text_for,
    tokens_for,
)


@pytest.fixture(params=[("running_mean",), ("running_mean", "cross_attention", "feed_forward")])
def architecture(request):
    register(RunningMean())
    yield register_architecture("toy", *request.param)
    del ARCHITECTURES["toy"], LAYERS["running_mean"]


def test_its_parameters_operations_and_memory_are_planned(architecture):
    config = small_config(architecture)
    model, text = MusicLM(config).eval(), text_for(config, CAPTIONS[:1])
    assert parameter_count(config) == count_parameters(model)
    positions = text.mask.shape[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_for(config, 1, 50), text)
    if architecture.has_prefix:  # torch counts attention by other operations than matrix products
        count = forward_flops(config, 50, positions)
        assert counter.get_total_flops() / 50 == pytest.approx(count.forward + count.text_encoder)
    assert activation_bytes(config, 100, 1) > activation_bytes(config, 50, 1) > 0


def test_its_steps_equal_the_parallel_pass(architecture):
    config = small_config(architecture, n_codebooks=2)
    model, text = small_model(config), text_for(config, CAPTIONS, [False, False, False, True])
    tokens = tokens_for(config, len(CAPTIONS), 12)
    torch.testing.assert_close(logits_by_steps(model, tokens, text), model(tokens, text), rtol=0, atol=1e-4)


def test_a_study_of_it_trains(architecture, tmp_path, study_fields):
    from harness.record.root import Root

    study_fields["grid"]["architectures"] = {str(architecture): None}
    root = Root(tmp_path / "root")
    train(root, study_fields)
    assert all(0 < loss < 6 for loss in losses(root, study_fields))
    assert "d_state" not in next((root.path / "runs").glob("*/run.json")).read_text()


def test_a_name_is_given_once_and_a_layer_must_be_known(architecture):
    with pytest.raises(ValueError, match="a layer 'running_mean' exists already"):
        register(RunningMean())
    with pytest.raises(ValueError, match="an architecture 'toy' exists already"):
        register_architecture("toy", "mamba2")
    with pytest.raises(ValueError, match="other: unknown layer mamba3; known: mamba2"):
        register_architecture("other", "mamba3")
