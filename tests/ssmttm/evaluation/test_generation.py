"""Generation: steps give the logits of the whole pass; seed, caption and sampling decide the tokens."""

import pytest
import torch

from ssmttm.errors import InputError
from ssmttm.generation import Sampling, generate, pick
from ssmttm.model.patterns import delay
from tests.ssmttm.small import CAPTIONS, logits_by_steps, small_config, small_model, text_for

FRAMES = 12
PLAIN = Sampling(top_k=None, guidance=1.0)


def delayed_codes(config):
    generator = torch.Generator().manual_seed(3)
    shape = (len(CAPTIONS), config.n_codebooks, FRAMES)
    return delay(torch.randint(0, config.codebook_size, shape, generator=generator), None, config.special)[0]


@pytest.fixture
def two_books(architecture):
    """A model of every architecture with two codebooks, and a batch of captions."""
    config = small_config(architecture, n_codebooks=2)
    return small_model(config), text_for(config, CAPTIONS)


simba = pytest.mark.parametrize("architecture", ["prefix_simba"])
"""For tests that need one architecture."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_codebooks": 3},
        {"n_groups": 2, "encoder": "frozen"},
        {"d_conv": 2},
        {"ff_mult": 4, "d_conv": 7},
    ],
)
def test_a_step_gives_the_logits_of_the_whole_sequence(architecture, changes):
    config = small_config(architecture, **changes)
    model, inputs = small_model(config), delayed_codes(config)
    text = text_for(config, CAPTIONS, dropped=[False, False, False, True])
    torch.testing.assert_close(logits_by_steps(model, inputs, text), model(inputs, text), rtol=0, atol=1e-4)


def test_guidance_moves_the_logits_away_from_those_without_a_caption(two_books):
    model, text = two_books
    special = model.config.special
    codes = generate(model, text, FRAMES, Sampling(top_k=1, guidance=2.5), range(4))
    inputs, targets = delay(codes, None, special)
    with torch.inference_mode():
        with_text, without = model(inputs, text), model(inputs, text.unconditional())
    guided = without + 2.5 * (with_text - without)
    likeliest = guided[..., :special].argmax(-1)
    assert torch.equal(likeliest[targets >= 0], targets[targets >= 0])


def test_guidance_of_zero_draws_the_tokens_of_the_model_without_captions(two_books):
    model, text = two_books
    found = generate(model, text, FRAMES, Sampling(guidance=0.0), range(4))
    assert torch.equal(found, generate(model, text.unconditional(), FRAMES, PLAIN, range(4)))
    assert not torch.equal(found, generate(model, text, FRAMES, PLAIN, range(4)))


def test_a_rows_tokens_depend_on_its_own_caption_and_seed_alone(two_books):
    model, text = two_books
    together = generate(model, text, FRAMES, Sampling(), [5, 6, 7, 8])
    for row, seed in enumerate([5, 6, 7, 8]):
        alone = generate(model, text_for(model.config, [CAPTIONS[row]]), FRAMES, Sampling(), [seed])
        assert torch.equal(alone[0], together[row])
    other_seed = generate(model, text, FRAMES, Sampling(), [9, 6, 7, 8])
    assert not torch.equal(other_seed[0], together[0])
    assert torch.equal(other_seed[1:], together[1:])


@simba
def test_a_longer_piece_begins_like_a_shorter_one(two_books):
    model, text = two_books
    long = generate(model, text, 2 * FRAMES, Sampling(), range(4))
    assert torch.equal(long[..., :FRAMES], generate(model, text, FRAMES, Sampling(), range(4)))


@simba
def test_the_special_token_is_never_drawn_even_if_it_is_the_likeliest(two_books):
    model, text = two_books
    config = model.config
    heads = model.head.weight.data.view(config.n_codebooks, config.vocabulary, -1)
    heads[:, : config.special] = 0
    heads[:, config.special] *= 100
    codes = generate(model, text, FRAMES, PLAIN, range(4))
    assert codes.shape == (4, 2, FRAMES)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < config.codebook_size


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (PLAIN, [100, 200, 300, 400]),
        (Sampling(top_k=2), [0, 0, 429, 571]),
        (Sampling(top_k=None, top_p=0.69), [0, 0, 429, 571]),
        (Sampling(top_k=None, top_p=0.71), [0, 222, 333, 444]),
        (Sampling(top_k=1), [0, 0, 0, 1000]),
        (Sampling(top_k=None, temperature=0.5), [33, 133, 300, 533]),
    ],
    ids=["plain", "top_k", "top_p", "top_p_just_above", "greedy", "temperature"],
)
def test_tokens_are_drawn_by_their_probabilities_under_the_sampling(sampling, expected):
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    draws = (torch.arange(1000) + 0.5) / 1000
    drawn = pick(logits.expand(1000, 4), draws, sampling)
    assert drawn.bincount(minlength=4).tolist() == pytest.approx(expected, abs=1)


def test_the_largest_draw_takes_the_last_possible_token():
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
def test_sampling_out_of_range_is_refused(mistake, named):
    with pytest.raises(InputError, match=named):
        Sampling(**mistake)


@pytest.mark.parametrize(
    "extreme",
    [{"temperature": 1e-45}, {"temperature": 1e300, "top_k": 1}, {"top_k": None, "top_p": 1e-300}],
    ids=["cold", "hot", "top_p"],
)
@simba
def test_extreme_sampling_draws_the_likeliest_token(extreme, two_books):
    model, text = two_books
    greedy = generate(model, text, FRAMES, Sampling(top_k=1), range(4))
    assert torch.equal(generate(model, text, FRAMES, Sampling(**extreme), range(4)), greedy)


@pytest.mark.parametrize("broken", [{"guidance": 1e308}, {"weight": float("nan")}], ids=["overflow", "nan"])
@simba
def test_logits_that_are_not_numbers_are_an_error(broken, two_books):
    model, text = two_books
    model.head.weight.data *= broken.get("weight", 1e4)
    with pytest.raises(InputError, match="logits are not finite numbers"):
        generate(model, text, FRAMES, Sampling(guidance=broken.get("guidance", 1.0)), range(4))


@simba
def test_steps_in_half_precision_give_nearly_the_same_logits(two_books):
    model, text = two_books
    inputs = delayed_codes(model.config)
    expected = model.bfloat16()(inputs, text)
    torch.testing.assert_close(
        logits_by_steps(model, inputs, text).float(), expected.float(), rtol=0, atol=0.1
    )
