import math

import pytest
import torch

from ssmttm.model.chunks import preferred_chunk
from ssmttm.model.ssd import ssd_scan


def sequential(x, dt, A, B, C, D, state):
    """Compute the recurrence as in the paper, one position at a time."""
    per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + B[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None]
        outputs.append((C[:, t, :, :, None] * state).sum(2) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def inputs(batch, length, heads, width, groups, d_state, seed=0):
    torch.manual_seed(seed)
    tensors = [
        torch.randn(batch, length, heads, width),
        torch.rand(batch, length, heads) * 0.3,
        -torch.rand(heads) * 8 - 0.5,
        torch.randn(batch, length, groups, d_state),
        torch.randn(batch, length, groups, d_state),
        torch.randn(heads),
        torch.randn(batch, heads, d_state, width),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


torch.set_num_threads(1)  # threads cost more than they save at these sizes

SHAPES = [
    # batch, length, heads, width, groups, d_state, chunk
    (2, 13, 4, 8, 2, 5, 4),
    (1, 64, 4, 4, 4, 3, 16),
    (2, 37, 2, 8, 1, 16, 8),
    (3, 1, 2, 4, 1, 8, 64),
    (1, 150, 2, 16, 1, 64, None),
    (1, 200, 2, 4, 1, 300, None),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_chunked_scan_and_its_gradients_equal_those_of_the_recurrence(shape):
    *sizes, chunk = shape
    arguments = inputs(*sizes)
    expected = sequential(*arguments)
    upstream = [torch.randn_like(tensor) for tensor in expected]
    got = ssd_scan(*arguments[:-1], chunk_size=chunk, initial_state=arguments[-1])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    ours = torch.autograd.grad(got, arguments, upstream)
    theirs = torch.autograd.grad(expected, arguments, upstream)
    for name, our, their in zip(("x", "dt", "A", "B", "C", "D", "state"), ours, theirs, strict=True):
        worst = (our - their).abs().max() / their.abs().max()
        assert worst < 3e-5, f"gradient of {name}: {worst:.1e}"


def test_without_a_state_the_scan_starts_from_zeros():
    *arguments, state = inputs(2, 21, 2, 4, 1, 6)
    got, final = ssd_scan(*arguments, chunk_size=8)
    expected, expected_final = sequential(*arguments, torch.zeros_like(state))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final, expected_final, atol=1e-5, rtol=1e-5)


def test_a_sequence_in_two_parts_equals_the_whole():
    x, dt, A, B, C, D, _ = inputs(2, 50, 4, 8, 2, 16)
    whole, final = ssd_scan(x, dt, A, B, C, D)
    first, state = ssd_scan(x[:, :19], dt[:, :19], A, B[:, :19], C[:, :19], D)
    second, state = ssd_scan(x[:, 19:], dt[:, 19:], A, B[:, 19:], C[:, 19:], D, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, final, atol=1e-5, rtol=1e-5)


def test_a_step_of_size_zero_leaves_the_state_unchanged():
    x, dt, A, B, C, D, state = inputs(2, 10, 2, 4, 1, 6)
    _, final = ssd_scan(x, torch.zeros_like(dt), A, B, C, D, initial_state=state)
    torch.testing.assert_close(final, state)


def test_decays_beyond_the_range_of_floats_give_finite_gradients():
    x, dt, _, B, C, D, _ = inputs(1, 40, 2, 4, 1, 6)
    A = torch.full((2,), -1e4, requires_grad=True)
    y, _ = ssd_scan(x, dt, A, B, C, D, chunk_size=40)
    gradients = torch.autograd.grad(y.sum(), [x, dt, A, B, C, D])
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_under_autocast_the_scan_stays_in_float32():
    *arguments, _ = inputs(1, 30, 2, 8, 1, 16)
    expected, _ = ssd_scan(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = ssd_scan(*arguments)
        gradient = torch.autograd.grad(got.sum(), arguments[0])[0]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), arguments[0])[0])
    assert state.dtype == torch.float32


def test_the_chunk_changes_results_by_rounding_only():
    *arguments, _ = inputs(1, 200, 2, 8, 1, 32)
    outputs = [ssd_scan(*arguments, chunk_size=chunk)[0] for chunk in (7, 64, 200, 512)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=2e-5, rtol=2e-5)


def test_a_larger_state_takes_a_larger_chunk():
    chunks = [preferred_chunk(d_state) for d_state in (16, 64, 512)]
    assert chunks == sorted(chunks)
    assert math.log2(chunks[-1]).is_integer()
