import math

import pytest
import torch
from torch.nn import functional as F

from ssmttm.model.loss import codebook_cross_entropy
from ssmttm.model.music_lm import MusicLM, weight_decay_groups
from ssmttm.model.patterns import IGNORED
from tests.ssmttm.small import CAPTIONS, pad_left, small_config, small_model, text_for, tokens_for

STEPS = 20


@pytest.fixture(params=["bytes", "frozen"])
def any_model(architecture, request):
    """A model of every architecture with either encoder."""
    return small_model(small_config(architecture, encoder=request.param))


def assert_near(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_padding_leaves_logits_unchanged(any_model):
    config = any_model.config
    tokens, text = tokens_for(config, 4, STEPS), text_for(config, CAPTIONS)
    assert_near(any_model(tokens, pad_left(text, 5, config.text.patch)), any_model(tokens, text))


def test_a_captions_logits_do_not_depend_on_the_rest_of_the_batch(any_model):
    config = any_model.config
    tokens = tokens_for(config, 4, STEPS)
    flags = [False, False, True, False]
    together = any_model(tokens, text_for(config, CAPTIONS, flags))
    for i, caption in enumerate(CAPTIONS):
        alone = any_model(tokens[i : i + 1], text_for(config, [caption], flags[i : i + 1]))
        assert_near(together[i : i + 1], alone)


def test_a_dropped_caption_does_not_reach_the_logits(any_model):
    tokens = tokens_for(any_model.config, 1, STEPS).expand(4, -1, -1)
    logits = any_model(tokens, text_for(any_model.config, CAPTIONS).unconditional())
    for row in logits[1:]:
        assert_near(row, logits[0])


def test_captions_and_the_null_condition_change_the_logits(any_model):
    config = any_model.config
    tokens = tokens_for(config, 1, STEPS)
    variants = [any_model(tokens, text_for(config, [caption])) for caption in CAPTIONS]
    variants.append(any_model(tokens, text_for(config, CAPTIONS[:1], [True])))
    for i, one in enumerate(variants):
        assert all((one - other).abs().max() > 1e-3 for other in variants[:i])


def test_dropped_rows_train_the_null_condition_and_not_the_text_encoder(architecture):
    config = small_config(architecture)
    model, tokens = small_model(config), tokens_for(config, 4, STEPS)
    model(tokens, text_for(config, CAPTIONS, [True] * 4)).square().sum().backward()
    assert model.null_condition.grad.abs().max() > 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.text_encoder.parameters())


def test_a_row_without_unmasked_positions_counts_as_dropped(any_model):
    config = any_model.config
    tokens, text = tokens_for(config, 4, STEPS), text_for(config, CAPTIONS)
    positions = torch.zeros_like(text.mask)
    positions[0] = True
    positions[1, -1] = True
    masked = text.without(positions)
    assert masked.dropped.tolist() == [True, False, False, False]
    logits = any_model(tokens, masked)
    assert logits.isfinite().all()
    expected = any_model(tokens, text_for(config, CAPTIONS, [True, False, False, False]))
    assert_near(logits[0], expected[0])
    assert (logits[1] - expected[1]).abs().max() > 1e-3
    assert_near(logits[2:], expected[2:])


def test_logits_never_depend_on_later_tokens(architecture):
    config = small_config(architecture, n_codebooks=2)
    model, text = small_model(config), text_for(config, CAPTIONS[:2])
    tokens = tokens_for(config, 2, STEPS)
    changed = tokens.clone()
    changed[:, :, 11:] = (changed[:, :, 11:] + 1) % config.vocabulary
    logits, others = model(tokens, text), model(changed, text)
    assert_near(logits[:, :, :11], others[:, :, :11])
    assert (logits[:, :, 11:] - others[:, :, 11:]).abs().max() > 1e-2


@pytest.mark.parametrize("codebooks", [1, 3])
def test_logits_have_a_row_for_each_codebook_and_start_near_the_uniform_loss(architecture, codebooks):
    config = small_config(architecture, n_codebooks=codebooks, codebook_size=200)
    torch.manual_seed(0)
    model, tokens = MusicLM(config).eval(), tokens_for(config, 3, STEPS)
    logits = model(tokens, text_for(config, CAPTIONS[:3]))
    assert logits.shape == (3, codebooks, STEPS, 201)
    sums, counts = codebook_cross_entropy(logits, tokens, 0.0)
    assert (sums / counts).tolist() == pytest.approx([math.log(201)] * codebooks, abs=0.2)


def test_every_parameter_learns(architecture):
    config = small_config(architecture, n_codebooks=2)
    model = small_model(config).train()
    tokens = tokens_for(config, 4, STEPS)
    logits = model(tokens, text_for(config, CAPTIONS, [True, False, False, False]))
    codebook_cross_entropy(logits, tokens, 0.1)[0].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_model_learns_melodies_by_their_captions(architecture):
    config = small_config(architecture, dropout=0.0)
    model = small_model(config).train()
    melodies = tokens_for(config, 2, STEPS)
    # Only the caption decides the first token.
    inputs = F.pad(melodies[:, :, :-1], (1, 0), value=config.special)
    text = text_for(config, CAPTIONS[:2])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        sums, counts = codebook_cross_entropy(model(inputs, text), melodies, 0.0)
        loss = (sums / counts).mean()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("codebooks", [1, 3])
def test_the_loss_equals_that_of_torch_summed_for_each_codebook(smoothing, codebooks):
    torch.manual_seed(0)
    logits = torch.randn(2, codebooks, 7, 11, requires_grad=True)
    targets = torch.randint(0, 11, (2, codebooks, 7))
    targets[0, :, 4:] = IGNORED
    sums, counts = codebook_cross_entropy(logits, targets, smoothing)
    expected = torch.stack([
        F.cross_entropy(
            logits[:, k].reshape(-1, 11), targets[:, k].flatten(), reduction="sum", label_smoothing=smoothing
        )
        for k in range(codebooks)
    ])  # fmt: skip
    torch.testing.assert_close(sums, expected)
    assert counts.tolist() == [11] * codebooks
    weights = torch.arange(1.0, codebooks + 1)
    ours = torch.autograd.grad((sums * weights).sum(), logits)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), logits)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_weight_decay_spares_vectors_and_covers_the_rest():
    model = small_model(small_config("cross_simba"))
    decayed, spared = weight_decay_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed) + len(spared) == len(names)
    spared_names = {names[id(parameter)].rpartition(".")[2] for parameter in spared}
    assert spared_names == {"A_log", "D", "dt_bias", "bias", "weight", "null_condition"}
    assert all("norm" in names[id(p)] for p in spared if names[id(p)].endswith("weight"))
    assert {"in_proj.weight", "conv1d.weight"} <= {".".join(names[id(p)].split(".")[-2:]) for p in decayed}


@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_under_bfloat16_autocast_the_loss_stays_close(architecture):
    config = small_config(architecture)
    model, tokens, text = small_model(config), tokens_for(config, 4, STEPS), text_for(config, CAPTIONS)
    expected, counts = codebook_cross_entropy(model(tokens, text), tokens, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, text)
        sums, _ = codebook_cross_entropy(logits, tokens, 0.1)
    sums.sum().backward()
    assert (logits.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(sums / counts, expected / counts, atol=2e-2, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.blocks.parameters())


def test_a_model_used_for_inference_first_can_still_be_trained():
    config = small_config("cross_transformer", d_model=48)
    model, tokens, text = small_model(config), tokens_for(config, 1, 300), text_for(config, CAPTIONS[:1])
    with torch.inference_mode():
        model(tokens, text)
    model(tokens, text).sum().backward()
