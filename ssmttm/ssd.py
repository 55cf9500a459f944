"""The state-space scan of Mamba-2 in its dual form: matrix products inside chunks, a recurrence between them.

"Transformers are SSMs" (arXiv 2405.21060), section 6. For every head, with a_t = dt_t A and states S of
(d_state, head_dim):

    S_t = exp(a_t) S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t

`ssd_scan` is the one door: which kernel runs behind it is not the model's business.
"""

import math

import torch
from torch import Tensor


def ssd_scan(  # noqa: PLR0917 (the order of the papers and of every kernel)
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return outputs (batch, length, heads, head_dim) and the final state (batch, heads, d_state, head_dim).

    x: (batch, length, heads, head_dim). dt: (batch, length, heads), positive step sizes; where dt is 0 the
    state passes through unchanged. A: (heads,), negative. B, C: (batch, length, groups, d_state). D:
    (heads,). chunk_size changes speed and floating-point order only.
    """
    batch, length, heads, width = x.shape
    groups, d_state = B.shape[2:]
    chunk = min(chunk_size or preferred_chunk(d_state), length)
    chunks = math.ceil(length / chunk)
    chunk = math.ceil(length / chunks)  # even chunks need the least padding
    padding = chunks * chunk - length

    def chunked(t: Tensor) -> Tensor:
        if padding:
            t = torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, padding))
        return t.reshape(batch * chunks, chunk, *t.shape[2:])

    per_group = heads // groups
    # z: batch and chunk together. Heads of a group share B and C, so they lie side by side as columns.
    dt = chunked(dt.float())  # (z, q, h)
    xdt = chunked(x.float()) * dt[..., None]  # (z, q, h, p)
    B = chunked(B.float()).transpose(1, 2)  # (z, g, q, n)
    C = chunked(C.float()).transpose(1, 2)
    decay = (dt * A.float()).cumsum(1)  # (z, q, h): log of the decay since the chunk began
    by_head = decay.transpose(1, 2)  # (z, h, q)

    # Within a chunk: y_i = sum_{j <= i} (C_i . B_j) exp(decay_i - decay_j) xdt_j.
    scores = C @ B.transpose(2, 3)  # (z, g, q, q)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    # -inf before the exponential: masking after it would leave inf * 0 = nan in the gradient.
    weights = (
        (by_head[..., :, None] - by_head[..., None, :]).masked_fill(later, -math.inf).exp()
    )  # (z, h, q, q)
    weights = (weights.reshape(-1, groups, per_group, chunk, chunk) * scores[:, :, None]).flatten(1, 2)
    y = (weights @ xdt.transpose(1, 2)).transpose(1, 2)  # (z, q, h, p)

    # What a chunk adds to the state by its end.
    to_end = (decay[:, -1:] - decay).exp()  # (z, q, h)
    columns = (xdt * to_end[..., None]).reshape(batch * chunks, chunk, groups, per_group * width)
    added = B.transpose(2, 3) @ columns.transpose(1, 2)  # (z, g, n, hg p)
    added = added.reshape(batch, chunks, groups, d_state, per_group, width)

    # Between chunks: the recurrence on whole states.
    through = decay[:, -1].exp().reshape(batch, chunks, groups, 1, per_group, 1)
    if initial_state is None:
        state = added.new_zeros(batch, groups, d_state, per_group, width)
    else:
        state = initial_state.float().reshape(batch, groups, per_group, d_state, width).transpose(2, 3)
    entering = []
    for c in range(chunks):
        entering.append(state)
        state = state * through[:, c] + added[:, c]
    before = torch.stack(entering, 1).reshape(batch * chunks, groups, d_state, per_group * width)
    carried = (C @ before).transpose(1, 2).reshape(batch * chunks, chunk, heads, width)

    y = y + carried * decay.exp()[..., None]
    y = y.reshape(batch, chunks * chunk, heads, width)[:, :length]
    y = y + x * D[:, None]
    return y.to(x.dtype), state.transpose(2, 3).reshape(batch, heads, d_state, width)


def preferred_chunk(d_state: int) -> int:
    """Return the chunk that balances work within chunks against work on states (measured on the CPU)."""
    return 64 if d_state <= 64 else 128
