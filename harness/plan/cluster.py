"""Clusters: the resources of this machine or of a profile, and layouts on them that meet a global batch exactly.

A profile is one YAML file that describes a SLURM cluster. It holds nothing of an experiment and a study nothing of a
cluster, so one study runs anywhere. Profiles are found by path, or by name in ./slurm/profiles and among those shipped
with the code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from harness.common.format import GIB
from harness.common.gpus import Gpu, read_gpus
from harness.common.limits import usable_memory
from harness.common.validation import PlainPath, read_yaml, validate, with_home
from harness.plan.container import Container
from harness.plan.peaks import is_slice, peak_flops
from harness.plan.speed import Device
from harness.record.root import Layout
from harness.study.run import Count, Frozen, Positive, Precision
from ssmttm.errors import InputError
from ssmttm.limits import usable_cores

SHIPPED = Path(__file__).parents[2] / "slurm" / "profiles"
"""Profiles shipped with the code."""
FOLDERS = (Path("slurm") / "profiles", SHIPPED)
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+-]*")
"""Form of SLURM's own names; others would need quotes on some command line."""
CONFIRM_GPU_HOURS = 100.0
"""GPU-hours above which `submit` asks first, unless a profile gives another limit."""


@dataclass(frozen=True)
class Cluster:
    """The resources of this machine or of a profile's cluster."""

    name: str
    nodes: int
    gpus: int
    """GPUs a node; 0 where ranks run on the CPU."""
    cores: int
    """CPU cores a node that ranks may use."""
    memory_gib: float
    """Memory a node, for ranks on the CPU."""
    peak_flops: Mapping[Precision, float] = field(default_factory=dict)
    """Peak FLOP/s of a rank's device by precision, where known."""
    gpu_memory_gib: float | None = None
    """Memory of a GPU, where known."""
    gpu_type: str | None = None
    """Name of a GPU, as the driver or the profile gives it."""
    hours: float | None = None
    """Longest time a job may ask for; None where there is no limit."""
    mfu: float | None = None
    """Share of the peak that training reaches there, where the site knows it."""
    device_names: tuple[str, ...] = ()
    """Names of this machine's GPUs in CUDA_VISIBLE_DEVICES; none for a profile's."""

    @property
    def cores_a_device(self) -> int:
        """CPU cores that a node has for each GPU, at least 1; 1 where ranks run on the CPU."""
        return max(1, self.cores // self.gpus) if self.gpus else 1

    @property
    def has_slices(self) -> bool:
        """True if its devices are MIG slices, which cannot train a Series together: NCCL connects whole GPUs alone."""
        return is_slice(self.gpu_type)

    @property
    def devices_a_node(self) -> int:
        """Number of devices a node: its GPUs, else its cores."""
        return self.gpus or self.cores

    @property
    def device_kind(self) -> str:
        """Name of a device in messages: GPU or core."""
        return "GPU" if self.gpus else "core"

    def device(self, precision: Precision, threads: int, peak_flops: float | None = None) -> Device:
        """Return the device of a rank."""
        if not self.gpus:
            return Device("cpu", threads=threads)
        return Device("cuda", self.gpu_type, peak_flops or self.peak(precision), mfu=self.mfu)

    def peak(self, precision: Precision) -> float | None:
        """Return the peak FLOP/s of a GPU: the profile's, else that of its name; None if neither is known."""
        return self.peak_flops.get(precision) or peak_flops(self.gpu_type, precision)


def this_machine() -> Cluster:
    """Describe what this process may use of the machine it runs on, without importing torch.

    GPUs that differ count as the weakest of them, since any Series may get any. A GPU that has no memory of its own to
    tell counts half of the host's.
    """
    found, memory_gib = read_gpus(), usable_memory() / GIB
    sizes = [gpu.memory / GIB if gpu.memory else memory_gib / 2 for gpu in found.devices]
    return Cluster(
        name="local",
        nodes=1,
        gpus=len(found.devices),
        cores=usable_cores(),
        memory_gib=memory_gib,
        gpu_memory_gib=min(sizes, default=None) if found.problem is None else None,
        gpu_type=min(found.devices, key=_strength).name if found.devices else None,
        device_names=tuple(gpu.handle for gpu in found.devices),
    )


def _strength(gpu: Gpu) -> tuple[float, ...]:
    peak = peak_flops(gpu.name, Precision.BF16) or 0.0
    return not is_slice(gpu.name), peak, gpu.memory or 0


def choose_layout(batch: int, ranks: int, micro_batch: int, zero_stage: int, threads: int) -> Layout:
    """Return the layout that meets the global batch exactly with the largest micro-batch up to `micro_batch`.

    Raises InputError where the ranks do not divide the batch.
    """
    if batch % ranks:
        raise InputError(f"training.batch: {batch}: does not divide among {ranks} ranks (resources.ranks)")
    share = batch // ranks
    micro = max(m for m in divisors(share) if m <= micro_batch)
    fields = {"ranks": ranks, "micro_batch": micro, "accumulation": share // micro}
    return Layout.model_validate(fields | {"zero_stage": zero_stage, "threads": threads})


def nodes_for(layout: Layout, cluster: Cluster) -> int:
    """Return the number of nodes a layout takes."""
    return -(-layout.ranks // ranks_a_node(cluster, layout.threads))


def ranks_a_node(cluster: Cluster, threads: int) -> int:
    """Return the number of ranks that a node takes: one a GPU, else one for each share of its cores."""
    return cluster.gpus or max(1, cluster.cores // threads)


def divisors(number: int) -> list[int]:
    """Return every divisor of a number, in ascending order."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*low, *(number // divisor for divisor in low)})


Name = Annotated[str, Field(pattern=rf"^{WORD.pattern}$", max_length=64)]


class Partition(Frozen):
    """One partition of a cluster; the profile's own values hold where it gives none."""

    hours: Positive | None = None
    """Longest job it takes; null where it has no limit."""
    nodes: Count | None = None
    """Most nodes of a job in it."""
    qos: Name | None = None
    """QOS of jobs in it, instead of the profile's."""


class Limits(Frozen):
    """The site's limits for one user."""

    array_size: Count = 1000
    """SLURM's MaxArraySize: the largest index of an array is one below it."""
    jobs: Count | None = None
    """Jobs a user may have in SLURM at once, each element of an array counted; null is no limit."""
    parallel: Count | None = None
    """Jobs of one array that run at once; null leaves it to the cluster."""
    hours: Positive = 24.0
    """Time requested for each job; a job that needs longer saves, is requeued and goes on."""


class Profile(Frozen):
    """The validated YAML of a cluster."""

    name: Name
    partitions: Annotated[dict[Name, Partition], Field(min_length=1)]
    """Partitions in the order of preference; a job may start in any that takes it."""
    nodes: Count = 1
    """Nodes a job may have at most."""
    gpus: Annotated[int, Field(strict=True, ge=0)]
    """GPUs a node; 0 where ranks run on the CPU."""
    gpu_type: Name | None = None
    """SLURM's name for the GPU, where a request must contain it (--gpus-per-node h100:8)."""
    gpu_memory_gib: Positive | None = None
    cores: Count
    """CPU cores a node."""
    memory_gib: Positive
    """Memory a node, GiB."""
    peak_flops: dict[Precision, Positive] = {}
    """Peak FLOP/s of a GPU by precision of the run: the vendor's dense figure."""
    mfu: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the peak that training reaches here, until finished runs show it; null assumes 0.15 to 0.5."""
    account: Name | None = None
    qos: Name | None = None
    constraint: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,&|*()\[\]:!-]+$")] | None = None
    exclude: Name | None = None
    reservation: Name | None = None
    setup: tuple[str, ...] = ()
    """Shell lines a job begins with, such as `module load cuda/12.8`; each job runs them unchanged."""
    container: Container | None = None
    """Container that jobs run in; null runs them with the Python that submits."""
    node_failures: tuple[str, ...] = ()
    """Patterns (Python's re) of further lines in a job's logs by which a node has failed, and not a run."""
    snapshot: bool = False
    """True if jobs run from a copy of the code made when they were submitted."""
    signal_seconds: Count = 90
    """Seconds before its end at which a job receives the signal to save."""
    limits: Limits = Limits()
    shared: tuple[PlainPath, ...] = ()
    """Directories that every node sees; if any is given, ROOT and corpus must lie in one of them."""
    confirm_gpu_hours: Positive = CONFIRM_GPU_HOURS
    """GPU-hours above which `submit` asks first."""

    @field_validator("partitions", mode="before")
    @classmethod
    def _bare_names_know_no_limits(cls, value: object) -> object:
        if isinstance(value, str):
            return {value: {}}
        if isinstance(value, list):
            return {name: {} for name in value}
        if isinstance(value, dict):
            return {name: {} if limits is None else limits for name, limits in value.items()}
        return value

    @field_validator("setup")
    @classmethod
    def _setup_lines_are_lines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            if "\n" in line or line.startswith("#SBATCH"):
                raise ValueError("a setup line must be one line of shell and no #SBATCH option")
        return value

    @field_validator("node_failures")
    @classmethod
    def _patterns_tell_lines_apart(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                matches_all = re.compile(pattern).search("") is not None
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
            if matches_all:
                raise ValueError(f"{pattern!r} matches every line: a failed run would always blame its node")
        return value

    @model_validator(mode="after")
    def _gpus_have_memory(self) -> Profile:
        if self.gpus and self.gpu_memory_gib is None:
            raise ValueError("gpu_memory_gib: is missing; nodes with gpus need it")
        return self

    @model_validator(mode="after")
    def _jobs_train_before_they_save(self) -> Profile:
        held = {f"partitions.{name}.hours": part.hours for name, part in self.partitions.items()}
        for key, hours in {"limits.hours": self.limits.hours, **held}.items():
            if hours is not None and self.signal_seconds >= 3600 * hours:
                raise ValueError(
                    f"signal_seconds: {self.signal_seconds} is no less than the {3600 * hours:g} s of {key}: "
                    "jobs would receive the signal to save when they start"
                )
        return self

    def partitions_for(self, nodes: int) -> list[str]:
        """Return the partitions that take a job of so many nodes, in the order of preference.

        A job has one QOS, so partitions with another QOS than the first of them are left out.
        """
        fitting = {
            name: part.qos
            for name, part in self.partitions.items()
            if part.nodes is None or nodes <= part.nodes
        }
        return [name for name, qos in fitting.items() if qos == next(iter(fitting.values()))]

    @property
    def most_nodes(self) -> int:
        """Most nodes of a job in any partition."""
        return max((n for n in range(1, self.nodes + 1) if self.partitions_for(n)), default=self.nodes)

    def qos_in(self, names: Sequence[str]) -> str | None:
        """Return the QOS of a job in the named partitions: their own, else the profile's."""
        return self.partitions[names[0]].qos or self.qos

    def hours_in(self, names: list[str]) -> float:
        """Return the hours a job may ask for that can start in any of the named partitions."""
        held = [self.partitions[name].hours for name in names]
        return min([self.limits.hours, *(hours for hours in held if hours is not None)])

    def cluster(self) -> Cluster:
        """Return the profile's resources."""
        same = {
            field.name: getattr(self, field.name) for field in fields(Cluster) if hasattr(self, field.name)
        }
        return Cluster(**same, hours=self.hours_in(self.partitions_for(1)))

    @property
    def container_of_jobs(self) -> Container | None:
        """The container with the driver of the GPUs where nodes have some; None if jobs have no container."""
        return self.container.with_gpus() if self.container and self.gpus else self.container

    def check_container(self, places: Mapping[str, Path] | None = None) -> None:
        """Raise InputError if the container's image is missing, or it cannot show one of these paths."""
        if self.container is None:
            return
        where = f"--cluster {self.name}"
        self.container.check_image(where)
        if self.container.image_file is not None:
            self.check_shared(f"{where}: container.image", self.container.image_file)
        self.container.check_paths(places or {})

    def check_shared(self, where: str, path: Path) -> None:
        """Raise InputError where `path` is on no file system that every node sees."""
        if self.shared and not any(path.absolute().is_relative_to(folder) for folder in self.shared):
            seen = ", ".join(str(folder) for folder in self.shared)
            raise InputError(f"{where}: {path.absolute()}: lies in none of the shared directories {seen}")


def load_profile(name_or_path: str) -> Profile:
    """Load the profile of that name or path; raises InputError naming the file and the wrong key."""
    path = _find(name_or_path)
    return validate(Profile, read_yaml(path), str(path))


def lasting_name(name_or_path: str) -> str:
    """Return a name of a profile that holds in any directory: a shipped profile's name, else the absolute path."""
    path = _find(name_or_path)
    return name_or_path if path.is_relative_to(SHIPPED) else str(path.absolute())


def profile_names() -> list[str]:
    """Return the names of all profiles found by name."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})


def _find(name_or_path: str) -> Path:
    path = with_home(Path(name_or_path))
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        return path
    for folder in FOLDERS:
        if WORD.fullmatch(name_or_path) and (found := folder / f"{name_or_path}.yaml").is_file():
            return found
    known = ", ".join(profile_names()) or "none"
    raise InputError(f"--cluster {name_or_path}: no such file or profile; the profiles are {known}")
