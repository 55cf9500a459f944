"""DeepSpeed behind four verbs: build an engine, take a step, evaluate without one, hand out the weights.

Everything DeepSpeed needs said on a machine without a GPU, and every default of it that would change a result or
waste memory on a small model, is said here and nowhere else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.dispatch.base import GPU_SHARE
from harness.run import Precision, Run
from harness.rundir import Layout
from harness.training.checkpoint import load_safely

if TYPE_CHECKING:
    import torch

    from ssmttm.model import MusicLM


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: str
    """A torch device: cuda:LOCAL_RANK or cpu."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes for all of them."""
        return self.rank == 0

    def tell(self, value: Any) -> Any:
        """The first rank's value, on every rank; collective."""
        if self.world == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def first_does(self, action: Callable[[], None]) -> None:
        """Run something on the first rank alone; what it raises is raised on every rank. Collective."""
        problem: Exception | None = None
        if self.is_first:
            try:
                action()
            except Exception as error:
                problem = error
        problem = self.tell(problem)
        if problem is not None:
            raise problem


def device_name(device: str) -> str | None:
    """A GPU as its driver names it; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return str(torch.cuda.get_device_name(device))


def initialise_ranks(threads: int) -> Ranks:
    """Join the process group described by RANK, WORLD_SIZE and MASTER_ADDR, or be a group of one.

    The group is made once a process and kept: a DeepSpeed engine built after a group was destroyed fails.
    """
    import torch

    from ssmttm.compat import keep_freed_memory, without_mlflow

    on_cuda = torch.cuda.is_available()
    if not on_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(threads)
    keep_freed_memory()
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "SLURM_PROCID" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if on_cuda:
        torch.cuda.set_device(local_rank)
        if share := os.environ.get(GPU_SHARE):  # who needs more runs out of memory, and not its neighbours
            torch.cuda.set_per_process_memory_fraction(float(share))
    if not torch.distributed.is_initialized():
        _join(rank, world, "nccl" if on_cuda else "gloo")
    _quieten_deepspeed()
    with without_mlflow():
        import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for half a minute
    deepspeed.init_distributed(dist_backend="nccl" if on_cuda else "gloo", verbose=False)
    return Ranks(rank, world, f"cuda:{local_rank}" if on_cuda else "cpu")


def _join(rank: int, world: int, backend: str) -> None:
    import torch
    from torch._C._distributed_c10d import FileStore, HashStore

    # DeepSpeed reads these even where the group already exists.
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if world == 1:  # no port to clash over
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    elif meeting := os.environ.get("SSMSCALE_RENDEZVOUS"):  # on one machine
        file_store = FileStore(meeting, world)
        torch.distributed.init_process_group(backend, store=file_store, rank=rank, world_size=world)
    elif folder := os.environ.get("SSMSCALE_MEETING"):  # on several
        from harness.training.rendezvous import meet

        store = meet(Path(folder), rank, world)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    else:
        torch.distributed.init_process_group(backend, init_method="env://")


def _quieten_deepspeed() -> None:
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


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

        from ssmttm.model import MusicLM, weight_decay_groups

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


if TYPE_CHECKING:
    _MicroLoss = Callable[[], torch.Tensor]
