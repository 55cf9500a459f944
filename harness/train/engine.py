"""DeepSpeed behind four verbs: build an engine, take a step, evaluate without one, hand out the weights.

Everything DeepSpeed needs said on a machine without a GPU, and every default of it that would change a result or
waste memory on a small model, is said here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.record.checkpoints import load_safely
from harness.record.root import Layout
from harness.study.run import Precision, Run
from harness.train.ranks import Ranks

if TYPE_CHECKING:
    import torch

    from ssmttm.model.music_lm import MusicLM

    _MicroLoss = Callable[[], torch.Tensor]


import time

import psutil

from harness.common.format import GIB


def deepspeed_config(run: Run, layout: Layout, n_params: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a Run on a layout."""
    # The default takes gigabytes for the smallest model; an odd one is refused by ZeRO 1 and 2.
    bucket = max(100_000, min(n_params + n_params % 2, 200_000_000))
    return {
        "train_batch_size": run.batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": run.optimiser.grad_clip or 0.0,
        "zero_optimization": {
            "stage": layout.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Parameters stay fp32; `bf16: enabled` would round A_log, dt_bias and D of the scan with the rest.
        "torch_autocast": {"enabled": run.precision is Precision.BF16, "dtype": "bfloat16"},
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }


class Engine:
    """One model in training under DeepSpeed."""

    def __init__(self, run: Run, layout: Layout, ranks: Ranks) -> None:
        import deepspeed
        import torch

        from ssmttm.model.music_lm import MusicLM, weight_decay_groups

        self.run, self.layout, self.ranks = run, layout, ranks
        torch.manual_seed(run.seed)
        model = MusicLM(run.model).to(ranks.device)
        model.checkpoints_activations = layout.activation_checkpointing
        decayed, spared = weight_decay_groups(model)
        settings = run.optimiser
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": spared, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
        )
        self._sizes = [parameter.numel() for parameter in model.parameters()]
        config = deepspeed_config(run, layout, sum(self._sizes))
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        # DeepSpeed's own would run whatever a pickle says, in any file that fits its patterns.
        self.deepspeed.checkpoint_engine.load = _load_safely

    @property
    def model(self) -> MusicLM:
        """The model itself, under its wrapper; under ZeRO 3 its parameters are partitioned."""
        return self.deepspeed.module  # type: ignore[no-any-return]

    def step(self, losses: Sequence[_MicroLoss], learning_rate: float) -> None:
        """Take one optimiser step over the micro-batches of this rank.

        Each entry computes the share of the global loss its micro-batch has, so that their sum over
        micro-batches and ranks is the loss of the global batch.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed divides by accumulation and averages over ranks; shares are to be summed.
        scale = self.layout.accumulation * self.layout.ranks
        for compute in losses:
            self.deepspeed.backward(compute() * scale)
            self.deepspeed.step()

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping, where DeepSpeed keeps it."""
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def checkpoint_bytes(self) -> int:
        """About the bytes of a checkpoint of all ranks: weights, two moments, and ZeRO's copy of the weights."""
        words = 3 if self.layout.zero_stage == 0 else 4
        return 4 * words * sum(self._sizes) + 1024 * len(self._sizes)

    def save_checkpoint(self, folder: Path, tag: str) -> None:
        """Write the files of a checkpoint; collective."""
        self.deepspeed.save_checkpoint(
            str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=False
        )

    def load_universal(self, folder: Path, tag: str) -> None:
        """Read a checkpoint that DeepSpeed's converter made for any number of ranks; collective."""
        config, optimizer = self.deepspeed._config, self.deepspeed.optimizer
        settings = [_without_parameters(group) for group in optimizer.param_groups]
        config.load_universal_checkpoint = True
        try:
            path, _ = self.deepspeed.load_checkpoint(str(folder), tag=tag)
        finally:
            config.load_universal_checkpoint = False
        if path is None:
            raise RuntimeError(f"{folder / tag}: DeepSpeed loaded nothing from it")
        # DeepSpeed gives every group the settings of the first, weight decay with them, and under stage 3 one and
        # the same step counter to all, which would then count once for each.
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        for state in optimizer.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """The whole model's weights on the CPU, on the first rank; collective under ZeRO 3."""
        import deepspeed

        parameters = list(self.model.parameters())
        with deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=None, enabled=self.layout.zero_stage == 3
        ):
            if not self.ranks.is_first:
                return None
            return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _load_safely(path: str, map_location: Any = None) -> Any:
    return load_safely(path, map_location)


EVERY_SECONDS = 10.0
"""Least time between two samples."""


class Usage:
    """Samples this process and the device it trains on."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # counts from here
        self._sampled: float | None = None

    def sample(self) -> dict[str, float] | None:
        """CPU and memory of this process, and of its GPU where it has one; None where the last sample is too new.

        CPU is a percentage of one core, memory in GiB; a figure that cannot be had is left out.
        """
        now = time.monotonic()
        if self._sampled is not None and now - self._sampled < EVERY_SECONDS:
            return None
        self._sampled = now
        figures = {
            "cpu_percent": round(self._process.cpu_percent(), 1),
            "memory_gib": round(self._process.memory_info().rss / GIB, 4),
        }
        return figures | (_of_gpu(self._device) if self._device.startswith("cuda") else {})


def _of_gpu(device: str) -> dict[str, float]:
    import torch

    figures = {"gpu_memory_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 4)}
    try:
        figures["gpu_percent"] = float(torch.cuda.utilization(device))
    except Exception:  # it asks a library of the driver's, which may be missing or refuse
        return figures
    return figures
