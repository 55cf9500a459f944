"""Memory of a rank that trains a model, by arithmetic alone: states, buffers and activations.

States are those that DeepSpeed 0.19 allocates for fp32 parameters at each ZeRO stage: its flat copies, its buckets and
the temporaries of its optimiser step. Activations are those that autograd saves of each sub-layer under PyTorch's own
kernels. The tests compare the sum with the peak of the engine on the CPU. CUDA kernels save other tensors, so there the
figures are an estimate with a wider range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.common.format import GIB, Estimate
from harness.record.root import Layout
from harness.study.run import Precision, Run
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count
from ssmttm.model.layers.layer import How
from ssmttm.text.config import BYTE_WIDTH

BUCKET = 200_000_000
"""Most parameters of one of DeepSpeed's buckets; see deepspeed_config."""
MOST_GATHERED = 4e9
"""Bytes of weights that ZeRO 3 gathers, and updates, at once (stage3_max_live_parameters, sub_group_size)."""
PERSISTENT = 100_000
"""Parameters of a tensor that ZeRO 3 leaves whole on every rank (stage3_param_persistence_threshold)."""
CUDA_CONTEXT = 0.6 * GIB
"""GPU memory of a process before its first tensor: context, cuBLAS workspace and NCCL's buffers, about."""
MARGINS = {False: (0.9, 1.15), True: (0.75, 1.3)}
"""Low and high over expected, on the CPU and on CUDA, where allocators fragment and kernels save less or more."""
MEASURED_MARGINS = (0.9, 1.15)
"""The same on CUDA once Runs of an architecture have been measured: allocators still fragment."""
HOST_PROCESS = 2.5 * GIB
"""Host memory of a process that computes on a GPU: imports take 1.1 GiB and the first use of CUDA 1.2 more (pytorch
issue 106511), and batches the rest."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak, by purpose."""

    weights: float
    gradients: float
    optimiser: float
    """AdamW's moments, and the flat fp32 copy of the weights that ZeRO keeps beside them."""
    buffers: float
    """DeepSpeed's buckets, gathered weights and temporaries of the optimiser step, as far as they are in the peak."""
    activations: float
    """Saved activations and the first gradients of the backward pass, as far as they are in the peak."""
    fixed: float
    """Bytes taken before the first tensor."""
    margins: tuple[float, float]
    measured: float | None = None
    """Measured peak over the sum of these parts in Runs of the same architecture; None before one has finished."""

    @property
    def allocated(self) -> float:
        """Expected bytes of all tensors."""
        parts = self.weights + self.gradients + self.optimiser + self.buffers + self.activations
        return (self.measured or 1.0) * parts

    @property
    def peak(self) -> Estimate:
        """Bytes in all."""
        low, high = self.margins
        return Estimate(low, 1.0, high) * self.allocated + Estimate(self.fixed, self.fixed, self.fixed)

    @property
    def gib(self) -> Estimate:
        """GiB in all."""
        return self.peak * (1 / GIB)

    def corrected(self, measured: float | None) -> Memory:
        """Return it with the peaks of finished Runs taken into account; unchanged without any."""
        if measured is None:
            return self
        return replace(self, measured=measured, margins=MEASURED_MARGINS)


def memory(run: Run, layout: Layout, *, on_cuda: bool = False, is_fused: bool | None = None) -> Memory:
    """Estimate the memory of a rank that trains a Run on a layout.

    is_fused: mamba-ssm's kernels do the work of Mamba-2 mixers; on CUDA they do unless told otherwise.

    The peak is where the backward pass begins, where it ends with all gradients and their bucket, or in the
    optimiser step, whichever is highest.
    """
    model = run.model
    whole = 4.0 * trained_parameters(model)
    share = whole / layout.ranks
    bucket = min(whole, 4.0 * BUCKET)
    if run.precision is Precision.BF16 and layout.zero_stage:
        bucket *= 1.5  # DeepSpeed reduces gradients of autocast weights in a bucket of their own, in bfloat16
    saved = activation_bytes(
        model,
        run.frames,
        layout.micro_batch,
        checkpointed=layout.activation_checkpointing,
        how=how_computed(run.precision, on_cuda=on_cuda, is_fused=is_fused),
    )
    if run.precision is Precision.BF16:
        saved += whole / 2  # autocast keeps the weights it has cast until the forward pass ends
    again = layout.accumulation > 1
    # CUDA's fused optimiser needs no memory; others have roots of second moments, and quotients, beside the gradients.
    roots = 0.0 if on_cuda else 2.0
    if layout.zero_stage == 0:
        weights, optimiser = whole, 2 * whole
        gradients = whole
        step = (1.0 if on_cuda else 1.5) * whole
        begin, end = (whole if again else 0.0) + saved, whole + bucket
    elif layout.zero_stage == 3:
        kept = _persistent(model)
        weights, optimiser = share + kept, 3 * share
        gradients = share + bucket  # averaged partitions, and a bucket that DeepSpeed never frees
        gathered = min(whole - kept, MOST_GATHERED) if layout.ranks > 1 else 0.0
        fetched = gathered + min(gathered, bucket)  # gathered flat, then taken apart
        begin = gradients + max(gathered + saved, fetched)
        end, step = gradients + 2 * bucket, gradients + (1 + roots) * min(share, MOST_GATHERED)
    else:
        weights, optimiser = whole, 3 * share
        gradients = share
        if layout.zero_stage == 1:  # all gradients stay until the last micro-batch
            held, end = (2 * whole, 1.5 * whole + bucket) if again else (0.0, whole + bucket)
        else:
            held, end = share if again else 0.0, 2 * bucket + (share if again or whole > bucket else 0.0)
        begin, step = held + saved, (2 + roots) * share
    peak = max(begin, end, step)
    activations = min(saved, max(0.0, peak - gradients)) if peak == begin else 0.0
    return Memory(
        weights=weights,
        optimiser=optimiser,
        gradients=min(gradients, peak - activations),
        buffers=max(0.0, peak - activations - gradients),
        activations=activations,
        fixed=CUDA_CONTEXT if on_cuda else 0.0,
        margins=MARGINS[on_cuda],
    )


def host_bytes(model: ModelConfig, layout: Layout) -> float:
    """Return the bytes of host memory of a rank that computes on a GPU: its process, and the checkpoint it reads.

    It reads all weights, and its share of AdamW's moments and of ZeRO's copy of the weights; without ZeRO both moments.
    """
    share = 12 / layout.ranks if layout.zero_stage else 8
    return HOST_PROCESS + (4 + share) * trained_parameters(model)


def trained_parameters(model: ModelConfig) -> int:
    """Count the parameters that the optimiser updates, text encoder and null condition included."""
    count = parameter_count(model)
    return count.n_params + count.text_encoder + count.null_condition


def activation_bytes(
    model: ModelConfig,
    frames: int,
    micro_batch: int,
    *,
    checkpointed: bool = False,
    how: How = How(),  # noqa: B008  # a tuple
) -> float:
    """Return the bytes of activations at their peak; `checkpointed` if only the input of each block is saved."""
    text = model.text.max_positions
    steps = frames + model.n_codebooks - 1
    length = steps + (text if model.architecture.has_prefix else 0)
    layers = [layer.saved(model, length, how) for layer in model.architecture.layers]
    around = _around_a_layer(model, how)
    block = sum(around + saved.kept for saved in layers)
    last = max(saved.at_once for saved in layers) + 2 * model.d_model
    blocks = model.n_blocks * _stream(model) + block if checkpointed else model.n_blocks * block
    logits = model.n_codebooks * model.vocabulary
    # log p and its gradient, each fp32; these are freed before the last layer's own gradients are computed.
    beginning = max(2 * logits * steps, last * length)
    read: float = text * (5 * model.d_model + 4 * model.text.dim)
    if model.text.encoder == "bytes":
        read += text * 2 * model.text.patch * BYTE_WIDTH
    read += text * model.n_blocks * sum(saved.of_text for saved in layers)
    ends = (model.d_model + 4 * model.n_codebooks) * steps + read
    return 4.0 * micro_batch * (blocks * length + beginning + ends)


def how_computed(precision: Precision, *, on_cuda: bool, is_fused: bool | None = None) -> How:
    """Return how a model is computed; on CUDA by mamba-ssm's kernels unless told otherwise."""
    half = 0.5 if precision is Precision.BF16 else 1.0
    return How(half, on_cuda, on_cuda if is_fused is None else is_fused)


def _around_a_layer(model: ModelConfig, how: How) -> float:
    """Return the floats a position that a residual sub-layer saves beside those of its layer.

    They are the residual stream and the reciprocal of its size, the layer's input, and what dropout keeps. Without
    CUDA's fused norm there are the normed values before their weight too.
    """
    d = model.d_model
    saved = _stream(model) + 1 + how.half * d + (how.mask(d) if model.dropout > 0 else 0.0)
    return saved if how.on_cuda else saved + d


def _stream(model: ModelConfig) -> float:
    """Return the floats a position of the residual stream."""
    return model.d_model * (0.5 if model.residual == "bf16" else 1.0)


def _persistent(model: ModelConfig) -> float:
    """Return the bytes of the tensors that ZeRO 3 leaves whole, about: all but the large matrices."""
    tables, d = model.n_codebooks * model.vocabulary, model.d_model
    shapes = [(tables, d), (tables, d), (model.text.dim, d)]
    for layer in model.architecture.layers:
        shapes += model.n_blocks * layer.matrices(model)
    parted = sum(rows * columns for rows, columns in shapes if rows * columns > PERSISTENT)
    return 4.0 * max(0, trained_parameters(model) - parted)
