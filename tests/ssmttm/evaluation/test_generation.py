"""Generation: a step says what the whole pass says; seed, caption and sampling decide what is drawn."""

import pytest
import torch

from ssmttm.errors import InputError
from ssmttm.generation import Sampling, generate, pick
from ssmttm.model.architecture import Architecture
from ssmttm.model.patterns import delay
from ssmttm.model.stepping import Decoder
from tests.ssmttm.small import ARCHITECTURES, CAPTIONS, small_config, small_model, text_for

FRAMES = 12
PLAIN = Sampling(top_k=None, guidance=1.0)


def delayed_codes(config, batch, frames=FRAMES, seed=3):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, config.codebook_size, (batch, config.n_codebooks, frames), generator=generator)
    return delay(codes, None, config.special)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_codebooks": 3},
        {"n_groups": 2, "encoder": "frozen"},
        {"d_conv": 2},
        {"ff_mult": 4, "d_conv": 7},
    ],
    ids=["one_codebook", "codebooks", "groups", "short_convolution", "long_convolution"],
)
def test_a_step_gives_the_logits_of_the_whole_sequence(architecture, changes):
    config = small_config(architecture, **changes)
    model = small_model(config)
    inputs = delayed_codes(config, len(CAPTIONS))
    text = text_for(config, CAPTIONS, dropped=[False, False, False, True])
    with torch.inference_mode():
        expected = model(inputs, text)
        decoder = Decoder(model, text, inputs.shape[2])
        found = torch.stack([decoder.step(step) for step in inputs.unbind(2)], dim=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_guidance_moves_the_logits_away_from_those_without_a_caption(architecture):
    config = small_config(architecture, n_codebooks=2)
    model, text = small_model(config), text_for(config, CAPTIONS)
    greedy = Sampling(top_k=1, guidance=2.5)
    codes = generate(model, text, FRAMES, greedy, range(4))
    inputs, targets = delay(codes, None, config.special)
    with torch.inference_mode():
        with_text, without = model(inputs, text), model(inputs, text.unconditional())
    guided = without + 2.5 * (with_text - without)
    likeliest = guided[..., : config.special].argmax(-1)
    assert torch.equal(likeliest[targets >= 0], targets[targets >= 0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_guidance_of_zero_is_the_model_without_captions_token_by_token(architecture):
    config = small_config(architecture, n_codebooks=2)
    model, text = small_model(config), text_for(config, CAPTIONS)
    found = generate(model, text, FRAMES, Sampling(guidance=0.0), range(4))
    assert torch.equal(found, generate(model, text.unconditional(), FRAMES, PLAIN, range(4)))
    assert not torch.equal(found, generate(model, text, FRAMES, PLAIN, range(4)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_rows_tokens_depend_on_its_own_caption_and_seed_alone(architecture):
    config = small_config(architecture, n_codebooks=2)
    model = small_model(config)
    together = generate(model, text_for(config, CAPTIONS), FRAMES, Sampling(), [5, 6, 7, 8])
    for row, seed in enumerate([5, 6, 7, 8]):
        alone = generate(model, text_for(config, [CAPTIONS[row]]), FRAMES, Sampling(), [seed])
        assert torch.equal(alone[0], together[row])
    other_seed = generate(model, text_for(config, CAPTIONS), FRAMES, Sampling(), [9, 6, 7, 8])
    assert not torch.equal(other_seed[0], together[0])
    assert torch.equal(other_seed[1:], together[1:])


def test_a_longer_piece_begins_as_a_shorter_one():
    config = small_config(Architecture.PREFIX_SIMBA)
    model, text = small_model(config), text_for(config, CAPTIONS)
    long = generate(model, text, 2 * FRAMES, Sampling(), range(4))
    assert torch.equal(long[..., :FRAMES], generate(model, text, FRAMES, Sampling(), range(4)))


def test_every_code_is_one_of_a_codebook_even_where_the_model_wants_the_special_token():
    config = small_config(Architecture.PREFIX_SIMBA, n_codebooks=3)
    model = small_model(config)
    heads = model.head.weight.data.view(config.n_codebooks, config.vocabulary, -1)
    heads[:, : config.special] = 0
    heads[:, config.special] *= 100
    codes = generate(model, text_for(config, CAPTIONS), FRAMES, PLAIN, range(4))
    assert codes.shape == (4, 3, FRAMES)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < config.codebook_size


def test_tokens_are_drawn_as_often_as_the_model_says():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    draws = (torch.arange(1000) + 0.5) / 1000
    drawn = pick(logits.expand(1000, 4), draws, PLAIN)
    assert drawn.bincount(minlength=4).tolist() == pytest.approx([100, 200, 300, 400], abs=1)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(top_k=2), [0, 0, 429, 571]),
        (Sampling(top_k=None, top_p=0.69), [0, 0, 429, 571]),
        (Sampling(top_k=None, top_p=0.71), [0, 222, 333, 444]),
        (Sampling(top_k=1), [0, 0, 0, 1000]),
        (Sampling(top_k=None, temperature=0.5), [33, 133, 300, 533]),
    ],
    ids=["top_k", "top_p", "top_p_just_above", "greedy", "temperature"],
)
def test_sampling_leaves_out_the_unlikely(sampling, expected):
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    draws = (torch.arange(1000) + 0.5) / 1000
    drawn = pick(logits.expand(1000, 4), draws, sampling)
    assert drawn.bincount(minlength=4).tolist() == pytest.approx(expected, abs=1)


def test_the_last_draw_takes_the_last_token_that_is_possible():
    logits = torch.tensor([0.0, 1.0, -torch.inf])
    assert pick(logits, torch.tensor(1 - 2**-24), PLAIN) == 1


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"guidance": -1.0}, "guidance is -1.0"),
    ],
)
def test_sampling_that_means_nothing_is_refused(mistake, named):
    with pytest.raises(InputError, match=named):
        Sampling(**mistake)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-45},
        {"temperature": 1e300, "top_k": 1},
        {"top_k": None, "top_p": 1e-300},
    ],
    ids=["cold", "hot", "top_p"],
)
def test_the_likeliest_token_is_drawn_however_extreme_the_sampling(extreme):
    config = small_config(Architecture.PREFIX_SIMBA, n_codebooks=2)
    model, text = small_model(config), text_for(config, CAPTIONS)
    greedy = generate(model, text, FRAMES, Sampling(top_k=1), range(4))
    assert torch.equal(generate(model, text, FRAMES, Sampling(**extreme), range(4)), greedy)


@pytest.mark.parametrize("broken", [{"guidance": 1e308}, {"weight": float("nan")}], ids=["overflow", "nan"])
def test_nothing_is_drawn_from_what_is_no_number(broken):
    config = small_config(Architecture.PREFIX_SIMBA)
    model = small_model(config)
    model.head.weight.data *= broken.get("weight", 1e4)
    with pytest.raises(InputError, match="logits are not finite numbers"):
        generate(
            model,
            text_for(config, CAPTIONS),
            FRAMES,
            Sampling(guidance=broken.get("guidance", 1.0)),
            range(4),
        )


def test_half_precision_says_nearly_the_same():
    config = small_config(Architecture.PREFIX_SIMBA)
    model = small_model(config).bfloat16()
    inputs, text = delayed_codes(config, len(CAPTIONS)), text_for(config, CAPTIONS)
    with torch.inference_mode():
        expected = model(inputs, text)
        decoder = Decoder(model, text, inputs.shape[2])
        found = torch.stack([decoder.step(step) for step in inputs.unbind(2)], dim=2)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.1)
