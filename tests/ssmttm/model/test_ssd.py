import pytest
import torch

from ssmttm.model.ssd import ssd_scan


def sequential(x, dt, A, B, C, D):
    """Compute the recurrence as in the paper, one position at a time."""
    per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    state, outputs = x.new_zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3]), []
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
    got = ssd_scan(*arguments, chunk_size=chunk)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    ours = torch.autograd.grad(got, arguments, upstream)
    theirs = torch.autograd.grad(expected, arguments, upstream)
    for name, our, their in zip(("x", "dt", "A", "B", "C", "D"), ours, theirs, strict=True):
        worst = (our - their).abs().max()
        assert worst <= 3e-5 * their.abs().max(), f"gradient of {name}: {worst:.1e}"


def test_a_step_of_size_zero_leaves_the_state_unchanged():
    x, dt, A, B, C, D = inputs(2, 10, 2, 4, 1, 6)
    _, before = ssd_scan(x[:, :7], dt[:, :7], A, B[:, :7], C[:, :7], D)
    _, after = ssd_scan(x, torch.cat([dt[:, :7], torch.zeros(2, 3, 2)], 1), A, B, C, D)
    torch.testing.assert_close(after, before)


def test_decays_beyond_the_range_of_floats_give_finite_gradients():
    x, dt, _, B, C, D = inputs(1, 40, 2, 4, 1, 6)
    A = torch.full((2,), -1e4, requires_grad=True)
    y, _ = ssd_scan(x, dt, A, B, C, D, chunk_size=40)
    gradients = torch.autograd.grad(y.sum(), [x, dt, A, B, C, D])
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_under_autocast_the_scan_stays_in_float32():
    arguments = inputs(1, 30, 2, 8, 1, 16)
    expected, _ = ssd_scan(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = ssd_scan(*arguments)
        gradient = torch.autograd.grad(got.sum(), arguments[0])[0]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), arguments[0])[0])
    assert state.dtype == torch.float32
