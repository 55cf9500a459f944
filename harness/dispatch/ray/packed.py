"""Tasks packed on the devices of one SLURM job, by a Ray that the job starts in its allocation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.dispatch.arrays import new_name, packed_folder
from harness.dispatch.base import Dashboard, Handle, Task
from harness.dispatch.ray.cluster import RayAddress
from harness.dispatch.slurm.backend import SlurmBackend
from harness.plan.allocation import Demand, allocate
from harness.plan.cluster import ranks_a_node
from harness.record.root import read_model_if_there
from ssmttm.errors import InputError


class PackedBackend(SlurmBackend):
    """Runs all tasks in one SLURM job, packed on its devices by a Ray that the job starts."""

    name, is_packed = "ray", True

    def count_at_once(self, series: int) -> int | None:
        """Return the number of Series of one device that the nodes of the job take."""
        cluster = self.profile.cluster()
        return min(series, cluster.devices_a_node * (self.target.nodes or self.profile.most_nodes))

    def count_admitted(self, tasks: int) -> int:
        """Return the number of tasks if the user may submit one more job, otherwise 0."""
        return tasks if super().count_admitted(1) else 0

    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Keep all tasks together."""
        return [list(tasks)] if tasks else []

    def submit(self, tasks: Sequence[Task], name: str = "") -> list[Handle]:
        """Submit one job in an allocation that fits these tasks; raises InputError if none does."""
        demands = [demand for task in tasks for demand in self._demands(task)]
        chosen = allocate(demands, self.profile, self.target.nodes)
        handles = self.submit_array(
            name or new_name(), tasks, chosen.shape, chosen.hours, packed=True, device=chosen.kind
        )
        return [replace(handle, allocation=str(chosen)) for handle in handles]

    def _demands(self, task: Task) -> list[Demand]:
        """Return the demand of a task: one, or as many as it takes devices if it drives the whole Ray."""
        cluster = self.profile.cluster()
        share = task.gpu_fraction if cluster.gpus else float(min(task.threads, cluster.cores))
        if task.drives_ray:
            return [Demand(task.label, 1, share, task.hours, 1)] * task.ranks
        nodes = -(-task.ranks // ranks_a_node(cluster, task.threads))
        return [Demand(task.label, task.ranks, share, task.hours, nodes)]

    def logs(self, handle: Handle) -> list[Path]:
        """Return the logs of the batch script and of the controller."""
        return [*super().logs(handle), packed_folder(self.study_dir, handle.batch) / "controller.log"]

    def dashboard(self, batch: str) -> Dashboard | None:
        """Return the dashboard of the Ray that a packed array's job started."""
        with contextlib.suppress(InputError):  # damaged, or of another user
            if ray := read_model_if_there(packed_folder(self.study_dir, batch) / "ray.json", RayAddress):
                return Dashboard(ray.dashboard, ray.tunnel(), ray.token_file)
        return None
