"""What the nodes of a Ray cluster are and what they see of our files: a job that `submit --ray-address` runs there.

python -m harness.ray_look FILE...      prints one JSON document in a line of its own
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.memory import GIB
from harness.provenance import installed_version
from harness.run import Frozen

MARK = "ssmscale sees "
"""What the line begins with that holds the document."""


class SeenNode(Frozen):
    """One node."""

    name: str
    cores: int
    gpus: int
    memory_gib: float
    gpu_type: str | None = None
    gpu_memory_gib: float | None = None
    hidden: tuple[str, ...] = ()
    """Files it was to see and does not."""


class Seen(Frozen):
    """A cluster."""

    ray: str
    python: str
    ssmscale: str | None
    nodes: tuple[SeenNode, ...]


def look(files: Sequence[str]) -> Seen:
    """Ask every node; this process is a driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(examine)
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            list(files)
        )
        for node in alive
    ]
    nodes = []
    for node, (hidden, gpu_gib) in zip(alive, ray.get(asked), strict=True):
        resources = node["Resources"]
        kinds = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
        nodes.append(
            SeenNode(
                name=node["NodeName"],
                cores=int(resources.get("CPU", 0)),
                gpus=int(resources.get("GPU", 0)),
                memory_gib=resources.get("memory", 0.0) / GIB,
                gpu_type=kinds[0] if kinds else None,
                gpu_memory_gib=gpu_gib,
                hidden=tuple(hidden),
            )
        )
    return Seen(
        ray=ray.__version__,
        python=platform.python_version(),
        ssmscale=installed_version("ssmscale"),
        nodes=tuple(nodes),
    )


def examine(files: Sequence[str]) -> tuple[list[str], float | None]:
    """On a node: which of the files it does not see, and the memory of its smallest GPU in GiB."""
    hidden = [file for file in files if not Path(file).exists()]
    if shutil.which("nvidia-smi") is None:
        return hidden, None
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    sizes = [float(word) / 1024 for word in said if word.replace(".", "", 1).isdigit()]
    return hidden, min(sizes, default=None)


def main() -> None:
    """Print what is seen."""
    import ray

    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    sys.stdout.write(f"{MARK}{look(sys.argv[1:]).model_dump_json()}\n")


if __name__ == "__main__":
    main()
