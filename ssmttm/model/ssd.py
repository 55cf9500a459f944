"""The state-space scan of Mamba-2 in its dual form: matrix products inside chunks, a recurrence between them.

"Transformers are SSMs" (arXiv 2405.21060), section 6. For every head, with states S of (d_state, head_dim):

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t

`ssd_scan` runs the kernel that `ssmttm.model.kernels` has chosen, or PyTorch. PyTorch's gradient is written by hand: a
tenth to a sixth faster on a CPU than autograd's, which keeps every intermediate.

Letters for shapes: z = batch * chunks, q = positions of a chunk, h = heads, p = head_dim, n = d_state,
g = groups, r = heads of a group, which share B and C and so are side by side as columns of one product.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmttm.model import kernels
from ssmttm.model.chunks import preferred_chunk


def ssd_scan(
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

    x: (batch, length, heads, head_dim). dt: (batch, length, heads), step sizes of 0 or more; a step of size 0 leaves
    the state unchanged. A: (heads,), negative. B, C: (batch, length, groups, d_state). D: (heads,). initial_state: as
    the final state; None for zeros. PyTorch computes the scan in float32 for all types of inputs; a kernel multiplies
    in the type of x, TF32 for float32, and adds in float32. chunk_size changes speed and floating-point order only.
    """
    kernel = kernels.kernels_for(x).scan
    if kernel is not None:
        y, state = kernel(
            *(x, dt.float(), A.float(), B, C, chunk_size or kernels.CHUNK),
            D=D.float(),
            initial_states=None if initial_state is None else initial_state.float().mT.contiguous(),
            return_final_states=True,
        )
        return y, state.mT  # the kernel's states are (batch, heads, head_dim, d_state)
    batch, length, heads, width = x.shape
    chunks = math.ceil(length / (chunk_size or preferred_chunk(B.shape[-1])))
    chunk = math.ceil(length / chunks)  # even chunks need the least padding
    padding = chunks * chunk - length

    def chunked(t: Tensor) -> Tensor:
        t = t.float()
        if padding:  # steps of size 0: they leave the state as it is
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding))
        return t.reshape(batch * chunks, chunk, *t.shape[2:])

    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, B.shape[-1], width)
    with torch.autocast(x.device.type, enabled=False):
        y, state = _ChunkedScan.apply(  # type: ignore[no-untyped-call]
            *(chunked(x), chunked(dt), A.float(), chunked(B), chunked(C), D.float(), initial_state.float())
        )
    y = y.reshape(batch, chunks * chunk, heads, width)
    return (y[:, :length] if padding else y).to(x.dtype), state


class ScanStep:
    """The recurrence, one position after the other; it changes its state in place.

    mamba-ssm's kernel does in one launch what takes PyTorch nine.
    """

    def __init__(self, state: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, groups: int) -> None:
        """Continue from a state (batch, heads, d_state, head_dim). dt_bias, A, D: (heads,)."""
        self._kernel = kernels.kernels_for(state).scan_step
        self._dt_bias, self._A, self._D = dt_bias, A, D[:, None]
        if self._kernel is not None:
            self._state = state.float().mT.contiguous()  # (batch, heads, head_dim, d_state)
        else:
            # (batch groups, d_state, heads of a group, head_dim): heads that share B and C form one matrix.
            by_group = torch.unflatten(state.float(), 1, (groups, -1)).transpose(2, 3)
            self._state = by_group.flatten(0, 1).contiguous()

    def __call__(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Return the next output (batch, heads, head_dim).

        x: as the output, float32. dt: (batch, heads), the step size before its bias and softplus. B, C: (batch, groups,
        d_state).
        """
        if self._kernel is not None:
            shape = self._state.shape[1:]  # (heads, head_dim, d_state)
            y: Tensor = self._kernel(
                *(self._state, x, dt[..., None].expand(x.shape), self._A[:, None, None].expand(shape), B, C),
                D=self._D.expand(shape[:2]),
                dt_bias=self._dt_bias[:, None].expand(shape[:2]),
                dt_softplus=True,
            )
            return y
        dt = F.softplus(dt.float() + self._dt_bias)  # (batch, heads)
        groups = self._state.shape[0]
        self._state.mul_((dt * self._A).exp().view(groups, 1, -1, 1))
        state = self._state.flatten(2)  # (batch groups, d_state, columns), the same memory
        state.addcmul_(B.reshape(groups, -1, 1), (x * dt[..., None]).view(groups, 1, -1))
        y = torch.bmm(C.reshape(groups, 1, -1), state).view(x.shape)
        return torch.addcmul(y, x, self._D)


class _ChunkedScan(torch.autograd.Function):
    """The scan of chunked inputs: x (z, q, h, p), dt (z, q, h), B, C (z, q, g, n), state (batch, h, n, p)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        z, q, h, p = x.shape
        g, n = B.shape[2:]
        batch = state.shape[0]
        Bg, Cg = _by_group(B, g), _by_group(C, g)  # (zg, q, n)
        decay = (dt * A).cumsum(1)  # (z, q, h): log of the decay since the chunk began
        from_start, to_end = decay.exp(), (decay[:, -1:] - decay).exp_()

        # Within a chunk: y_i = sum over j <= i of (C_i . B_j) exp(decay_i - decay_j) dt_j x_j.
        by_head = decay.transpose(1, 2).contiguous()  # (z, h, q)
        # -inf before the exponential: masked values may overflow, and inf * 0 is nan.
        later = torch.full((q, q), -math.inf, device=x.device).triu_(1)
        decays = (by_head[..., None] - by_head[:, :, None]).add_(later).exp_()  # (z, h, q, q)
        scores = torch.bmm(Cg, Bg.mT)  # (zg, q, q)
        weights = (decays.view(z, g, -1, q, q) * scores.view(z, g, 1, q, q)).view(z * h, q, q)
        xdt = x.new_empty(z, h, q, p)
        torch.mul(x.transpose(1, 2), dt.transpose(1, 2)[..., None], out=xdt)
        within = torch.bmm(weights, xdt.view(z * h, q, p))

        # Between chunks: the term each adds to the state by its end, and the recurrence on whole states.
        x_end = _by_group(x * (to_end * dt)[..., None], g)  # (zg, q, rp)
        added = torch.bmm(Bg.mT, x_end).view(batch, -1, g, n, h // g, p)
        through = from_start[:, -1].reshape(batch, -1, g, 1, h // g, 1)
        entering = torch.empty_like(added)
        entering[:, 0] = state.view(batch, g, -1, n, p).transpose(2, 3)
        for c in range(1, added.shape[1]):
            torch.addcmul(added[:, c - 1], entering[:, c - 1], through[:, c - 1], out=entering[:, c])
        final = torch.addcmul(added[:, -1], entering[:, -1], through[:, -1])
        entering = entering.view(z * g, n, -1)

        read = torch.bmm(Cg, entering)  # (zg, q, rp)
        y = _by_position(read, x.shape) * from_start[..., None]
        y.add_(within.view(z, h, q, p).transpose(1, 2)).addcmul_(x, D[:, None])
        final = final.transpose(2, 3).reshape(batch, h, n, p)
        ctx.save_for_backward(
            *(x, dt, A, Bg, Cg, D, decays, weights, xdt, x_end, read, from_start, to_end, entering)
        )
        ctx.batch = batch
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, Bg, Cg, D, decays, weights, xdt, x_end, read, from_start, to_end, entering = (
            ctx.saved_tensors
        )
        z, q, h, p = x.shape
        g, n, batch = Bg.shape[0] // z, Bg.shape[2], ctx.batch
        dy = torch.zeros_like(x) if dy is None else dy
        d_final = x.new_zeros(batch, h, n, p) if d_final is None else d_final
        with torch.autocast(x.device.type, enabled=False):
            # The recurrence backwards: gradients of the states that leave each chunk.
            dy_start = _by_group(dy * from_start[..., None], g)  # (zg, q, rp)
            d_entering = torch.bmm(Cg.mT, dy_start).view(batch, -1, g, n, h // g, p)
            through = from_start[:, -1].reshape(batch, -1, g, 1, h // g, 1)
            d_leaving = torch.empty_like(d_entering)
            d_leaving[:, -1] = d_final.view(batch, g, -1, n, p).transpose(2, 3)
            for c in range(d_entering.shape[1] - 1, 0, -1):
                torch.addcmul(d_entering[:, c], d_leaving[:, c], through[:, c], out=d_leaving[:, c - 1])
            d_state = torch.addcmul(d_entering[:, 0], d_leaving[:, 0], through[:, 0])
            d_state = d_state.transpose(2, 3).reshape(batch, h, n, p)
            d_leaving = d_leaving.view(z * g, n, -1)

            # Through the weights of a chunk.
            dy_head = dy.transpose(1, 2).reshape(z * h, q, p)
            d_weights = torch.bmm(dy_head, xdt.view(z * h, q, p).mT)  # (zh, q, q)
            up_to = (d_weights * weights).cumsum(-1)
            d_scores = d_weights.view(z, h, q, q).mul_(decays).view(z, g, -1, q, q)
            d_scores = d_scores.sum(2).view(-1, q, q) if h > g else d_scores.view(-1, q, q)
            dC = torch.bmm(d_scores, Bg).baddbmm_(dy_start, entering.mT)
            dB = torch.bmm(d_scores.mT, Cg).baddbmm_(x_end, d_leaving.mT)
            within = torch.bmm(weights.mT, dy_head).view(z, h, q, p).transpose(1, 2)
            dx_end = torch.bmm(Bg, d_leaving)
            dxdt = _by_position(dx_end, x.shape) * to_end[..., None] + within

            # The decay at t scales all terms that pass from positions before t to t and later: inside the chunk, from
            # the entering state, into the leaving state, and from one to the other. Only such terms are summed: the
            # shorter way, differences of row sums, has a hundred times the error.
            d_decay = x.new_zeros(z, q, h)
            d_decay[:, 1:] = up_to[:, 1:, :-1].tril_().sum(1).view(z, h, q - 1).transpose(1, 2)
            read = _by_position((dy_start * read).view(-1, q, h // g, p).sum(-1), (z, q, h))
            written = _by_position((x_end * dx_end).view(-1, q, h // g, p).sum(-1), (z, q, h))
            passed = (entering * d_leaving).view(z, g, n, h // g, p).sum((2, 4)).view(z, h)
            d_decay += read.flip(1).cumsum(1).flip(1)
            d_decay[:, 1:] += written.cumsum(1)[:, :-1]
            d_decay += (passed * from_start[:, -1])[:, None]

            d_step = (dxdt * x).sum(-1)  # (z, q, h)
            d_dt = torch.addcmul(d_step, d_decay, A)
            dA = (d_decay * dt).sum((0, 1))
            dD = (dy * x).sum((0, 1, 3))
            dx = dxdt.mul_(dt[..., None]).addcmul_(dy, D[:, None])
        to_input = (z, q, g, n)
        return dx, d_dt, dA, _by_position(dB, to_input), _by_position(dC, to_input), dD, d_state


def _by_group(t: Tensor, groups: int) -> Tensor:
    """Reshape (z, q, heads or groups, width) to (z groups, q, columns); a view if there is one group."""
    z, q = t.shape[:2]
    return t.reshape(z, q, groups, -1).transpose(1, 2).reshape(z * groups, q, -1)


def _by_position(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape (z groups, q, columns) back to `shape`, (z, q, heads or groups, width)."""
    z, q = shape[:2]
    return t.reshape(z, -1, q, t.shape[-1]).transpose(1, 2).reshape(shape)
