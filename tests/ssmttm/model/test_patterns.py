import pytest
import torch

from ssmttm.model.patterns import IGNORED, delay, undelay

SPECIAL = 99


def codes_of(batch: int, codebooks: int, frames: int) -> torch.Tensor:
    """Return codes that are all different, so that a misplaced one shows."""
    return torch.arange(batch * codebooks * frames).view(batch, codebooks, frames) + 1000


def test_the_pattern_is_the_one_written_in_the_module():
    inputs, targets = delay(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), None, SPECIAL)
    assert inputs.tolist() == [[[SPECIAL, 1, 2, 3], [SPECIAL, SPECIAL, 4, 5]]]
    assert targets.tolist() == [[[1, 2, 3, IGNORED], [IGNORED, 4, 5, 6]]]


@pytest.mark.parametrize(("codebooks", "frames"), [(1, 5), (4, 9), (3, 1), (2, 2)])
def test_every_code_is_a_target_exactly_once_and_undelay_undoes_delay(codebooks, frames):
    codes = codes_of(3, codebooks, frames)
    _, targets = delay(codes, None, SPECIAL)
    assert sorted(targets[targets != IGNORED].tolist()) == sorted(codes.flatten().tolist())
    assert torch.equal(undelay(targets), codes)


@pytest.mark.parametrize("codebooks", [1, 3])
def test_an_input_is_the_target_of_the_step_before(codebooks):
    inputs, targets = delay(codes_of(2, codebooks, 6), None, SPECIAL)
    expected = torch.where(targets[..., :-1] == IGNORED, SPECIAL, targets[..., :-1])
    assert torch.equal(inputs[..., 1:], expected)
    assert (inputs[..., 0] == SPECIAL).all()


def test_frames_past_a_clips_length_are_neither_read_nor_targets():
    codes = codes_of(2, 2, 5)
    inputs, targets = delay(codes, torch.tensor([3, 5]), SPECIAL)
    short_inputs, short_targets = delay(codes[:1, :, :3], None, SPECIAL)
    assert torch.equal(targets[:1, :, :4], short_targets)
    assert (targets[0, :, 4:] == IGNORED).all()
    assert torch.equal(inputs[:1, :, :4], short_inputs)
    assert set(inputs[0].flatten().tolist()) == {SPECIAL, *codes[0, :, :3].flatten().tolist()}
    assert sorted(targets[1][targets[1] != IGNORED].tolist()) == codes[1].flatten().tolist()
