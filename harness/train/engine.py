"""DeepSpeed's engine: built, stepped, loaded, and its weights gathered.

Only this file sets DeepSpeed's options: those it needs on a machine without a GPU, and those whose defaults would
change a result or waste memory on a small model.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from harness.common.format import GIB
from harness.record.checkpoints import loading_safely
from harness.record.root import Layout
from harness.study.run import Precision, Run
from harness.train.ranks import Ranks

if TYPE_CHECKING:
    import torch

    from ssmttm.model.music_lm import MusicLM

SAMPLE_SECONDS = 10.0
"""Least time between two samples of resource usage."""


def deepspeed_config(run: Run, layout: Layout, n_params: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a Run on a layout."""
    # The default takes gigabytes for the smallest model; an odd one is refused by ZeRO 1 and 2.
    bucket = max(100_000, min(n_params + n_params % 2, 200_000_000))
    return {
        "train_batch_size": run.batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        # Without ZeRO, DeepSpeed measures a gradient norm only in order to clip it.
        "gradient_clipping": run.optimiser.grad_clip or (0.0 if layout.zero_stage else math.inf),
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
    """One model that trains under DeepSpeed."""

    def __init__(self, run: Run, layout: Layout, ranks: Ranks) -> None:
        import deepspeed
        import torch

        from ssmttm.compat import pickle_zero_stages_by_value
        from ssmttm.model.music_lm import MusicLM, weight_decay_groups

        pickle_zero_stages_by_value()
        self.run, self.layout, self.ranks = run, layout, ranks
        torch.manual_seed(run.seed)
        model = MusicLM(run.model).to(ranks.device)
        _models.add(model)
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
        self._worst = torch.zeros(1, device=ranks.device)
        """Largest gradient norm since it was last read: reading it waits until a GPU has done all that it was given."""

        def clip() -> None:
            self.deepspeed._global_grad_norm = clip_gradients(model, self.deepspeed.gradient_clipping())

        # Without ZeRO; DeepSpeed's own drops the norm, and waits for the GPU twice.
        self.deepspeed.clip_fp32_gradients = clip

    def free(self) -> None:
        """Let go of the model and its optimiser; the engine is of no use afterwards.

        ZeRO's hooks on the gradients hold it, in circles through autograd that the garbage collector cannot see.
        """
        with contextlib.suppress(RuntimeError):  # it waits for the GPU, whose error is known by now
            self.deepspeed.destroy()

    def step(self, losses: Sequence[Callable[[], torch.Tensor]], learning_rate: float) -> None:
        """Take one optimiser step over the micro-batches of this rank.

        Each entry computes its micro-batch's share of the loss: the sum over micro-batches and ranks is the loss of the
        global batch.
        """
        import torch

        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed divides by accumulation and averages over ranks; the shares must be summed.
        scale = self.layout.accumulation * self.layout.ranks
        for compute in losses:
            self.deepspeed.backward(compute() * scale)
            self.deepspeed.step()
        norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32)
        torch.maximum(self._worst, norm.to(self._worst.device), out=self._worst)  # a NaN stays

    def grad_norm(self) -> float:
        """Return the gradient norm of the global batch in the last step, before clipping."""
        return float(self.deepspeed.get_global_grad_norm())

    def worst_grad_norm(self) -> float:
        """Return the largest gradient norm of the steps since the last call: NaN or infinite if one of them was."""
        worst = float(self._worst)
        self._worst.zero_()
        return worst

    def is_finite(self) -> bool:
        """Return True if all weights and optimiser moments of all ranks are finite; collective."""
        import torch

        norms = torch._foreach_norm([held for held in self._state() if held.numel()], math.inf)
        finite = torch.isfinite(torch.stack(norms)).all().to(torch.int32)
        if self.ranks.world > 1:
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        return bool(finite)

    def _state(self) -> list[torch.Tensor]:
        """Return the weights and moments that this rank holds, without ZeRO 3's padding, which nothing sets."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        weights = list(self.deepspeed.module.parameters())
        if self.layout.zero_stage == 3:
            held = []
            for weight in weights:
                part = weight.partition_numel()
                real = min(part, max(0, weight.ds_numel - part * self.ranks.rank))
                moments = [safe_get_local_optimizer_state(weight, key) for key in ("exp_avg", "exp_avg_sq")]
                held += [one[:real] for one in (safe_get_local_fp32_param(weight), *moments)]
            return held
        optimizer = self.deepspeed.optimizer
        held = weights
        for master, state in getattr(optimizer, "optimizer", optimizer).state.items():  # ZeRO wraps torch's
            held += [master, state["exp_avg"], state["exp_avg_sq"]]
        return held

    @property
    def checkpoint_bytes(self) -> int:
        """Approximate size of a checkpoint of all ranks: weights, two moments, and ZeRO's copy of the weights."""
        words = 3 if self.layout.zero_stage == 0 else 4
        return 4 * words * sum(self._sizes) + 1024 * len(self._sizes)

    def load(self, folder: Path, tag: str) -> None:
        """Load a checkpoint of as many ranks; collective."""
        with loading_safely():
            path, _ = self.deepspeed.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise RuntimeError(f"{folder / tag}: DeepSpeed found nothing to load")
        self._worst.zero_()

    def load_universal(self, folder: Path, tag: str) -> None:
        """Load a checkpoint that DeepSpeed's converter made for any number of ranks; collective."""
        config, optimizer = self.deepspeed._config, self.deepspeed.optimizer
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        config.load_universal_checkpoint = True
        try:
            self.load(folder, tag)
        finally:
            config.load_universal_checkpoint = False
        # DeepSpeed gives every group the settings of the first, its weight decay included, and under stage 3 one
        # step counter to all parameters, which would then count once for each.
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        for state in optimizer.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """Return the model's weights on the CPU, on the first rank alone; collective under ZeRO 3."""
        import deepspeed

        model: MusicLM = self.deepspeed.module  # under ZeRO 3 its parameters are partitioned
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=None, enabled=self.layout.zero_stage == 3
        ):
            if not self.ranks.is_first:
                return None
            return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def clip_gradients(model: torch.nn.Module, most: float) -> torch.Tensor:
    """Scale all gradients so that their norm is at most `most`; return the norm of before.

    Nothing waits for a GPU, and the result is that of DeepSpeed's clip_grad_norm_ to the bit.
    """
    import torch

    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).pow(2).sum().sqrt()
    # A number divided by a tensor would be multiplied by its reciprocal, and rounded twice.
    share = torch.full_like(norm, most) / (norm + 1e-6)
    torch._foreach_mul_(gradients, share.clamp(max=1.0))
    return norm


_models: weakref.WeakSet[MusicLM] = weakref.WeakSet()
"""Models of the engines that this process has built and still holds."""


def engines_held() -> int:
    """Return the number of engines in memory; one of ZeRO 3 stays for good (DeepSpeed 0.19.8)."""
    return len(_models)


def free_memory() -> None:
    """Free what engines that nothing refers to have held, on the device too: other tasks may share it."""
    import torch

    from ssmttm.compat import return_freed_memory

    gc.collect()  # an engine refers to itself
    return_freed_memory()
    torch.cuda.empty_cache()  # does nothing without a GPU


class Usage:
    """Samples the resources that this process and its device use for one Series."""

    def __init__(self, device: str) -> None:
        if device.startswith("cuda"):  # a warm process has had others
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # counts from here
        self._sampled: float | None = None

    def sample(self) -> dict[str, float] | None:
        """Return CPU (percent of one core) and memory (GiB) of this process and its GPU; None if sampled too recently.

        A GPU's utilisation is missing where the driver does not report it.
        """
        now = time.monotonic()
        if self._sampled is not None and now - self._sampled < SAMPLE_SECONDS:
            return None
        self._sampled = now
        figures = {
            "cpu_percent": round(self._process.cpu_percent(), 1),
            "memory_gib": round(self._process.memory_info().rss / GIB, 4),
        }
        if self._device.startswith("cuda"):
            import torch

            figures["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(self._device) / GIB, 4)
            with contextlib.suppress(Exception):  # the driver's library may be missing or refuse
                figures["gpu_percent"] = float(torch.cuda.utilization(self._device))
        return figures
