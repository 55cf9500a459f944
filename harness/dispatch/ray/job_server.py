"""The job server of somebody else's Ray cluster: submit a job by a name of our own, ask after it, stop it.

Whoever finds a job of ours written down and does not know whether it was submitted asks by that name. Ray forgets its
jobs when its head ends, and then journals tell what became of them.

What the nodes of a Ray cluster are and what they see of our files: a job that `submit --ray-address` runs there.

python -m harness.dispatch.ray.job_server FILE...      prints one JSON document in a line of its own
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.common.extras import missing_package
from harness.common.format import GIB
from harness.record.jobs import JobState, JobView, SchedulerUnavailable
from harness.record.provenance import installed_version
from harness.study.run import Frozen

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

CONNECT_SECONDS = 5.0
"""How long a host may take to answer at all."""
ADDRESS = re.compile(
    r"(?:(?P<kind>https?|ray)://)?(?P<host>\[[^\]]+\]|[^:/\[\]]+)(?::(?P<port>\d+))?(?:/.*)?"
)
PORTS = {"http": 80, "https": 443, "ray": 10001, None: 6379}
"""The port of each kind of address where it names none."""
STATES = {"PENDING": JobState.QUEUED, "RUNNING": JobState.RUNNING}
"""What Ray calls a job that is not over."""
NOT_STARTED = "Ray has not started it yet"


def ray_unavailable(why: str) -> SchedulerUnavailable:
    """Return the error that says why a Ray cluster does not answer, or not us; it may have ended for good."""
    return SchedulerUnavailable("Ray", why, may_be_over=True)


@dataclass(frozen=True)
class Ended:
    """A job that is over, and what it printed."""

    status: str
    output: str


class RayJobs:
    """The jobs of the Ray cluster at http://HOST:8265, ray://HOST:10001 or HOST:6379."""

    def __init__(self, address: str) -> None:
        """Raises SchedulerUnavailable."""
        self.address = address
        _check_reachable(address)
        with self._answering(), _without_addresses():
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(address)
        self.server = str(self._client.get_address())
        """Its job server, as http://HOST:PORT."""

    def submit(self, name: str, command: str, environment: Mapping[str, str]) -> None:
        """Have a line of shell run on the cluster. Raises SchedulerUnavailable."""
        with self._answering():
            self._client.submit_job(
                entrypoint=command, submission_id=name, runtime_env={"env_vars": dict(environment)}
            )

    def views(self) -> dict[str, JobView]:
        """What Ray says of each job it was given, by name. Raises SchedulerUnavailable."""
        with self._answering():
            jobs = self._client.list_jobs()
        return {job.submission_id: self._view(job) for job in jobs if job.submission_id}

    def _view(self, job: JobDetails) -> JobView:
        begun = job.start_time / 1000 if job.start_time else time.time()
        ended = job.end_time / 1000 if job.end_time else time.time()
        said, name = str(job.status.value), str(job.submission_id)
        state = STATES.get(said, JobState.ENDED)
        why = NOT_STARTED if state is JobState.QUEUED else None
        return JobView(name, name, state, said, max(0.0, ended - begun), self.server, why)

    def stop(self, name: str) -> None:
        """Ask a job to end; one that is over already does not matter. Raises SchedulerUnavailable."""
        with self._answering():
            self._client.stop_job(name)

    def wait(self, name: str, seconds: float) -> Ended | None:
        """Wait for a job's end and hear what it printed; None where it takes longer. Raises SchedulerUnavailable."""
        deadline = time.monotonic() + seconds
        while (view := self.views().get(name)) is not None and view.state is not JobState.ENDED:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.2)
        with self._answering():
            return Ended(view.slurm_state if view else "UNKNOWN", str(self._client.get_job_logs(name)))

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn what can go wrong on the way into one sentence."""
        try:
            yield
        except ModuleNotFoundError as error:
            raise ray_unavailable(f"{self.address}: {missing_package(error)}") from error
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "uthentication" in f"{type(error).__name__} {said}" or "uthToken" in said:
                path = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
                said = "wants a token; RAY_AUTH_MODE=token sends the one that RAY_AUTH_TOKEN_PATH names"
                if os.environ.get("RAY_AUTH_MODE") == "token":
                    said = f"refuses the token in {path}; RAY_AUTH_TOKEN_PATH says where the right one is"
            raise ray_unavailable(f"{self.address}: {said}") from error


def python_there(*arguments: str) -> str:
    """A line of shell that becomes our Python where a node has it, with the harness, and else becomes its own."""
    ours, line = shlex.quote(sys.executable), shlex.join(arguments)
    return (
        f'python={ours}; "$python" -c \'import harness\' 2>/dev/null || python=python; exec "$python" {line}'
    )


def _check_reachable(address: str) -> None:
    """Raise SchedulerUnavailable where nothing listens at an address: Ray's own clients take a minute to say so."""
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise ray_unavailable(
            f"{address}: is no address of a Ray cluster; there are http://HOST:8265, ray://HOST:10001 and HOST:6379"
        )
    host, port = found["host"].strip("[]"), int(found["port"] or PORTS[found["kind"]])
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ray_unavailable(f"{address}: nothing answers there ({error})") from error


@contextlib.contextmanager
def _without_addresses() -> Iterator[None]:
    """Hide variables by which Ray's client would go to another cluster than it is told to."""
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


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
