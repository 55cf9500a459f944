"""What a Run costs before it is trained: tokens, FLOPs, memory, disk and time, from arithmetic alone.

Tokens and FLOPs are exact for whole clips. Memory is weights, gradients and AdamW's two moments in fp32 under
the ZeRO stage, and an estimate of saved activations; disk is what checkpoints hold of these. Time is FLOPs over a
speed: the one measured on this machine for the architecture and size where the study has finished something, else
an assumed share of the peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from harness.run import Frozen, Positive, Run
from ssmttm.config import ModelConfig, SubLayer, TextConfig
from ssmttm.flops import parameter_count, training_flops

CPU_FLOPS_A_THREAD = 8e9
"""Assumed FLOP/s of a CPU thread training a small model, until a finished Run says better."""
ASSUMED_MFU = 0.3
"""Assumed share of a GPU's peak."""
BYTES_A_BYTE_TOKEN = 4.0
"""Bytes of caption a position of a frozen subword encoder covers, about."""
GIB = 2.0**30


class Calibration(Frozen):
    """calibration.json of a study: speeds measured by its finished Runs, FLOP/s a rank, by architecture/size."""

    flops_per_second: dict[str, Positive] = {}

    def speed(self, architecture: str, size: str) -> float | None:
        """The measured speed of a size, else the median over the architecture's sizes, else None."""
        if (exact := self.flops_per_second.get(f"{architecture}/{size}")) is not None:
            return exact
        others = sorted(v for k, v in self.flops_per_second.items() if k.split("/")[0] == architecture)
        return others[len(others) // 2] if others else None


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


def memory_gib(
    model: ModelConfig,
    *,
    frames: int,
    micro_batch: int,
    ranks: int,
    zero_stage: int,
    checkpointed: bool = False,
) -> float:
    """GiB a rank: weights, gradients and moments under the ZeRO stage, and saved activations.

    checkpointed: whether of each block its input alone is saved.
    """
    n = _saved_parameters(model)
    optimiser = 8 * n / (ranks if zero_stage >= 1 else 1)
    gradients = 4 * n / (ranks if zero_stage >= 2 else 1)
    weights = 4 * n / (ranks if zero_stage >= 3 else 1)
    return (
        weights + gradients + optimiser + activation_bytes(model, frames, micro_batch, checkpointed)
    ) / GIB


def checkpoint_bytes(model: ModelConfig, zero_stage: int) -> int:
    """Bytes of a checkpoint, whatever the ranks: fp32 weights and AdamW's two moments.

    Under ZeRO 1 and 2 the optimiser's shards hold the weights once more; measured to within 0.4 %.
    """
    return (16 if zero_stage in {1, 2} else 12) * _saved_parameters(model)


def weights_bytes(model: ModelConfig) -> int:
    """Bytes of a finished Run's model.safetensors."""
    return 4 * _saved_parameters(model)


def _saved_parameters(model: ModelConfig) -> int:
    count = parameter_count(model)
    return count.n_params + count.text_encoder + count.null_condition


def activation_bytes(model: ModelConfig, frames: int, micro_batch: int, checkpointed: bool = False) -> float:
    """Bytes of fp32 activations kept for the backward pass, about: vectors saved by each sub-layer and the logits.

    checkpointed: the inputs of all blocks, and what one block saves.
    """
    steps = (
        frames + model.n_codebooks - 1 + (model.text.max_positions if model.architecture.has_prefix else 0)
    )
    saved = 0.0
    if model.architecture.has_mixer:
        scan = 2 * model.n_ssm_heads * min(steps, 256) + 4 * model.n_groups * model.d_state
        saved += 2 * model.d_model + 10 * model.d_inner + scan
    if not model.architecture.has_prefix:
        saved += 2 * 8 * model.d_model
    if SubLayer.FEED_FORWARD in model.architecture.sub_layers:
        saved += (3 + 3 * model.ff_mult) * model.d_model
    logits = 3 * model.n_codebooks * model.vocabulary
    blocks = model.n_blocks * model.d_model + saved if checkpointed else model.n_blocks * saved
    return 4.0 * micro_batch * steps * (blocks + logits)


def assumed_speed(threads: int, peak_flops: float | None) -> float:
    """FLOP/s of a rank before anything was measured."""
    return ASSUMED_MFU * peak_flops if peak_flops else CPU_FLOPS_A_THREAD * threads


def calibrate(measured: Mapping[str, Sequence[float]]) -> Calibration:
    """The median of the speeds (FLOP/s a rank) that finished Runs had, by architecture/size."""
    return Calibration(flops_per_second={key: median(speeds) for key, speeds in measured.items() if speeds})
