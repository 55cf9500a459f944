"""What a Run costs before it is trained: tokens, FLOPs, disk and hours, from arithmetic alone.

Tokens and FLOPs are exact for whole clips; disk is what checkpoints hold. Hours are steps at the speed that
harness.speed predicts, evaluations, checkpoints and a start, as a range; memory is harness.memory's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.memory import NOTHING, Range, trained_parameters
from harness.run import Run
from harness.rundir import Layout
from harness.speed import Device, Speeds, step_work
from ssmttm.config import ModelConfig, TextConfig
from ssmttm.flops import parameter_count, training_flops

BYTES_A_BYTE_TOKEN = 4.0
"""Bytes of caption a position of a frozen subword encoder covers, about."""
START_SECONDS = Range(10.0, 30.0, 120.0)
"""From a job's start to its first step on a cluster: imports, process group, engine."""
WARM_START_SECONDS = Range(0.2, 0.5, 10.0)
"""The same where workers stay warm between Series."""
CHECKPOINT_BYTES_A_SECOND = Range(0.1e9, 0.4e9, 2e9)
"""What a checkpoint with its checksums is written at: from a busy network disk to a local one."""
EVAL_SHARE = 1 / 3
"""Work of an evaluated sequence over that of one trained on: a forward pass alone."""


@dataclass(frozen=True)
class Cost:
    """Estimates for one Run taken alone, its trunk included."""

    n_params: int
    n_params_non_embedding: int
    tokens: int
    flops: float


def mean_text_positions(text: TextConfig, captions: Sequence[str]) -> int:
    """Text positions of an average caption, at least one; the limit where there are no captions to ask."""
    if not captions:
        return text.max_positions
    width = text.patch if text.encoder == "bytes" else BYTES_A_BYTE_TOKEN
    mean = sum(-(-(len(caption.encode()) + 1) // width) for caption in captions) / len(captions)
    return max(1, min(text.max_positions, round(mean)))


def run_cost(run: Run, text_positions: int) -> Cost:
    """The arithmetic of a Run."""
    count = parameter_count(run.model)
    tokens_per_step = run.batch * run.frames * run.model.n_codebooks
    flops_per_step = training_flops(run.model, run.frames, text_positions) * run.batch * run.frames
    return Cost(
        n_params=count.n_params,
        n_params_non_embedding=count.non_embedding,
        tokens=run.iterations * tokens_per_step,
        flops=run.iterations * flops_per_step,
    )


def checkpoint_bytes(model: ModelConfig, zero_stage: int) -> int:
    """Bytes of a checkpoint, whatever the ranks: fp32 weights and AdamW's two moments.

    Under ZeRO 1 and 2 the optimiser's shards hold the weights once more; measured to within 0.4 %.
    """
    return (16 if zero_stage in {1, 2} else 12) * trained_parameters(model)


def weights_bytes(model: ModelConfig) -> int:
    """Bytes of a finished Run's model.safetensors."""
    return 4 * trained_parameters(model)


@dataclass(frozen=True)
class Duration:
    """Seconds of training a Series, by what they are spent on."""

    step: Range
    """An optimiser step."""
    evaluation: Range
    """The held-out loss, once."""
    checkpoint: Range
    """Writing one."""
    start: Range
    """A job's way to its first step."""
    source: str
    """What the step rests on: measured, calibrated, borrowed or assumed."""

    def hours(self, steps: int, *, evaluations: int, checkpoints: int, starts: int = 0) -> Range:
        """Hours of so many steps and what goes with them."""
        seconds = self.step * steps + self.evaluation * evaluations + self.checkpoint * checkpoints
        return (seconds + self.start * starts) * (1 / 3600)


def duration(
    architecture: str,
    run: Run,
    layout: Layout,
    device: Device,
    speeds: Speeds,
    *,
    text_positions: int,
    eval_clips: int,
    warm: bool = False,
) -> Duration:
    """How long a Series like this takes on a device."""
    work = step_work(run, layout, text_positions, on_cuda=device.kind == "cuda")
    step, source = speeds.seconds(architecture, run, work, device)
    size, rate = checkpoint_bytes(run.model, layout.zero_stage), CHECKPOINT_BYTES_A_SECOND
    return Duration(
        step=step,
        evaluation=step * (EVAL_SHARE * eval_clips / run.batch),
        checkpoint=Range(size / rate.high, size / rate.expected, size / rate.low),
        start=WARM_START_SECONDS if warm else START_SECONDS,
        source=source,
    )


def total(ranges: Sequence[Range]) -> Range:
    """The sum of ranges, end by end: what is wrong with one estimate is wrong with its like."""
    return sum(ranges, NOTHING)
