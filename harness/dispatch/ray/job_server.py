"""A client of an existing Ray cluster's job server, and the job that inspects the cluster.

Jobs are submitted under unique names, by which the ledger can ask for them if a submission was cut short. Ray forgets
its jobs when its head ends; then only the journals tell how they ended.

`submit --ray-address` runs the inspection job there, which prints the cluster's nodes, and which of the files they do
not see, as JSON on one line:

    python -m harness.dispatch.ray.job_server FILE...
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
from pathlib import Path
from typing import TYPE_CHECKING

from harness.common.extras import missing_package
from harness.common.format import GIB
from harness.common.process import SAFE_PATH, interpreter
from harness.record.jobs import JobState, JobView, SchedulerUnavailable
from harness.record.provenance import installed_version
from harness.study.run import Frozen

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

CONNECT_SECONDS = 5.0
"""Time limit of a connection to the host."""
ADDRESS = re.compile(
    r"(?:(?P<kind>https?|ray)://)?(?P<host>\[[^\]]+\]|[^:/\[\]]+)(?::(?P<port>\d+))?(?:/.*)?"
)
PORTS = {"http": 80, "https": 443, "ray": 10001, None: 6379}
"""Default port of each kind of address."""
STATES = {"PENDING": JobState.QUEUED, "RUNNING": JobState.RUNNING}
"""Ray's names for the states of jobs that are not over."""
MARK = "ssmscale sees "
"""Prefix of the line in which the inspection job prints its document."""


class RayJobs:
    """The jobs of the Ray cluster at http://HOST:8265, ray://HOST:10001 or HOST:6379."""

    def __init__(self, address: str) -> None:
        """Connect to the cluster. Raises SchedulerUnavailable."""
        self.address = address
        self._check_reachable()
        with self._answering(), _without_addresses():
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(address)
        self.server = str(self._client.get_address())
        """Address of its job server, http://HOST:PORT."""

    def unavailable(self, why: str) -> SchedulerUnavailable:
        """Return the error that says why the cluster does not answer; it may have ended for good."""
        return SchedulerUnavailable("Ray", f"{self.address}: {why}", may_be_over=True)

    def submit(self, name: str, command: str, environment: Mapping[str, str]) -> None:
        """Run a shell line on the cluster. Raises SchedulerUnavailable."""
        with self._answering():
            self._client.submit_job(
                entrypoint=command,
                submission_id=name,
                runtime_env={"env_vars": SAFE_PATH | dict(environment)},
            )

    def views(self) -> dict[str, JobView]:
        """Return Ray's view of its jobs by name. Raises SchedulerUnavailable."""
        with self._answering():
            jobs = self._client.list_jobs()
        return {job.submission_id: self._view(job) for job in jobs if job.submission_id}

    def _view(self, job: JobDetails) -> JobView:
        begun = job.start_time / 1000 if job.start_time else time.time()
        ended = job.end_time / 1000 if job.end_time else time.time()
        status, name = str(job.status.value), str(job.submission_id)
        state = STATES.get(status, JobState.ENDED)
        why = "Ray has not started it yet" if state is JobState.QUEUED else None
        return JobView(name, name, state, status, max(0.0, ended - begun), self.server, why)

    def stop(self, name: str) -> None:
        """Ask a job to end; ignore one that is over. Raises SchedulerUnavailable."""
        with self._answering():
            self._client.stop_job(name)

    def wait(self, name: str, seconds: float) -> tuple[str, str]:
        """Return the status and the output of the inspection job once it has ended. Raises SchedulerUnavailable."""
        deadline = time.monotonic() + seconds
        while (view := self.views().get(name)) is not None and view.state is not JobState.ENDED:
            if time.monotonic() > deadline:
                raise self.unavailable(f"the inspection job has not ended after {seconds:.0f} s")
            time.sleep(0.2)
        with self._answering():
            return view.slurm_state if view else "UNKNOWN", str(self._client.get_job_logs(name))

    def _check_reachable(self) -> None:
        """Raise SchedulerUnavailable if nothing listens at the address: Ray's clients take a minute to find out."""
        found = ADDRESS.fullmatch(self.address)
        if found is None:
            raise self.unavailable(
                "is not an address of a Ray cluster; give http://HOST:8265, ray://HOST:10001 or HOST:6379"
            )
        host, port = found["host"].strip("[]"), int(found["port"] or PORTS[found["kind"]])
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise self.unavailable(f"nothing answers there ({error})") from error

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn any error of the client into SchedulerUnavailable with one sentence."""
        try:
            yield
        except ModuleNotFoundError as error:
            raise self.unavailable(missing_package(error)) from error
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "uthentication" in f"{type(error).__name__} {said}" or "uthToken" in said:
                path = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
                said = "needs a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the token's file"
                if os.environ.get("RAY_AUTH_MODE") == "token":
                    said = (
                        f"refuses the token in {path}; set RAY_AUTH_TOKEN_PATH to the file of the right one"
                    )
            raise self.unavailable(said) from error


def python_there(*arguments: str) -> str:
    """Return a shell line that runs this Python if the node has it with the harness, otherwise the node's own."""
    ours, *options = map(shlex.quote, interpreter())
    python = f'"$python" {" ".join(options)}'
    tried = f"python={ours}; {python} -c 'import harness' 2>/dev/null || python=python"
    return f"{tried}; exec {python} {shlex.join(arguments)}"


@contextlib.contextmanager
def _without_addresses() -> Iterator[None]:
    """Hide variables that take precedence over the address given to Ray's client."""
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


class SeenNode(Frozen):
    """A node of an inspected cluster."""

    name: str
    hidden: tuple[str, ...] = ()
    """Files that it should see and does not."""
    cores: int
    gpus: int
    memory_gib: float
    gpu_type: str | None = None
    gpu_memory_gib: float | None = None


class Seen(Frozen):
    """The result of an inspection."""

    ray: str
    python: str
    ssmscale: str | None
    nodes: tuple[SeenNode, ...]


def look(files: Sequence[str]) -> Seen:
    """Inspect every node; this process must be a driver of the cluster."""
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
    """Return the files that this node does not see, and the memory of its smallest GPU in GiB."""
    hidden = [file for file in files if not Path(file).exists()]
    if shutil.which("nvidia-smi") is None:
        return hidden, None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    sizes = [float(word) / 1024 for word in output if word.replace(".", "", 1).isdigit()]
    return hidden, min(sizes, default=None)


def main() -> None:
    """Print the result of the inspection."""
    import ray

    with contextlib.chdir("/"):  # Ray has its workers import from the driver's folder
        ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    sys.stdout.write(f"{MARK}{look(sys.argv[1:]).model_dump_json()}\n")


if __name__ == "__main__":
    main()
