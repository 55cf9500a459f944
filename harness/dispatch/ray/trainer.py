"""A long Series in a Ray Train TorchTrainer, which places its ranks and starts them again when one of them dies.

Its ranks run what `harness.train.worker` runs, in a process group that Ray Train has made, and go on from the Series'
own checkpoints: Ray Train's are not used. It takes half a minute to start, so that short Series stay with warm ranks.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.common.process import print_traceback, sent_to
from harness.dispatch.base import Handle, Task
from harness.dispatch.packing.decide import Shape
from harness.dispatch.worker_process import environment_of_rank, state_of
from harness.record.jobs import JobState
from harness.record.journal import ProgressReader, Span
from harness.record.root import Root
from harness.train.stopping import EXIT_NO_SPACE, EXIT_PREEMPTED, MOST_ATTEMPTS, StopFile

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

START_SECONDS = 28.0
"""From handing over to the first step: two ranks on two cores, process starts and imports (23 to 28 s measured)."""
MOST_START = 0.05
"""Largest part of a Series' training that its start may take."""
LOOK_SECONDS = 2.0
"""How often the nodes are looked at that a Series is trained on."""
NO_NODE = 30.0
"""Seconds Ray Train waits for room, which whoever chose the nodes has made; then it is looked for anew."""
NO_ROOM = "WorkerGroupStartupTimeoutError"
"""What Ray Train calls it where it has waited in vain; nothing has been tried, then."""


def is_long(job: Task) -> bool:
    """Whether a Series trains for so long that a start of its own is small against it."""
    return job.gpu_fraction == 1.0 and job.seconds * MOST_START >= START_SECONDS


def log_path(job: Task) -> Path:
    """What Ray Train says where it gives up on a Series."""
    return (job.folder / "logs").absolute() / "trainer.log"


class TrainerGroup:
    """The ranks of one long Series, for the dispatcher like any other group; its trainer lives in a Ray task."""

    _numbers = itertools.count(1)

    def __init__(self, shape: Shape, nodes: tuple[str, ...], log_dir: Path, *, on_gpus: bool) -> None:
        """`log_dir` is seen by all nodes."""
        number = next(self._numbers)
        self.key = f"trainer-{number}"
        self.shape, self.nodes, self.on_gpus = shape, nodes, on_gpus
        self.began = time.monotonic()
        self.fed = self.began + START_SECONDS
        """When its first step is expected."""
        self.handle: Handle | None = None
        self.is_leaving = self.is_gone = False
        self.is_ready = True
        """From the start: how long it takes to get ready says nothing of other groups."""
        self.took: float | None = None
        """Seconds its Series took, by its journal; None where it did not finish, or its ranks were started again."""
        self.device: str | None = None
        """It shares none."""
        self._folder = log_dir.absolute() / "trainers" / f"{os.getpid()}-{time.time_ns()}-{number}"
        self._stop_file = self._folder / "stop"
        self._until = 0.0
        self._task: Any = None
        self._look_again = 0.0
        self._journal = ProgressReader(newest_only=True)
        self._spans_before = 0

    def feed(self, handle: Handle) -> None:
        """Have it train its one Series."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.handle = handle
        self._spans_before = len(self._spans(handle.task))
        self._folder.mkdir(parents=True)
        StopFile.make(self._stop_file)
        context = ray.get_runtime_context()
        self._task = (
            ray.remote(_fit)
            .options(
                name=f"trainer of {handle.task.series_id}",
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False),
                runtime_env={"env_vars": {**_TRAINER, "RAY_ADDRESS": context.gcs_address}},
            )
            .remote(self._told(handle.task))
        )

    def let_go(self, seconds: float) -> None:
        """Have its ranks save and end within so many seconds; it is gone when they are."""
        if not self.is_leaving:
            self.is_leaving = True
            self._until = time.monotonic() + seconds
            StopFile.ask(self._stop_file, signal.SIGTERM.name)

    def poll(self) -> tuple[Handle | None, JobState | None]:
        """The job, where it ended since the last call, and how."""
        import ray

        if not ray.wait([self._task], timeout=0)[0]:
            self._end_where_hopeless()
            return None, None
        try:
            outcome = ray.get(self._task)
        except ray.exceptions.RayError:  # its process was killed, or ended from here
            outcome = "lost"
        shutil.rmtree(self._folder, ignore_errors=True)
        self.is_gone = True
        handle, self.handle = self.handle, None
        if handle is not None and outcome == "finished":
            spans = self._spans(handle.task)[self._spans_before :]
            self.took = spans[0].ended - spans[0].begun if len(spans) == 1 else None
        return handle, JobState.LOST if outcome == "lost" else state_of(outcome)

    def _spans(self, job: Task) -> Sequence[Span]:
        """Every start of the Series: Ray Train tells of none after the first."""
        root = Root(job.run_dirs[0].parent.parent)
        return self._journal.read(root.series(job.series_id)).spans

    def _end_where_hopeless(self) -> None:
        """End a trainer that was let go and takes too long, or whose node is gone, for which alone it would wait."""
        import ray

        if time.monotonic() < self._look_again:
            return
        self._look_again = time.monotonic() + LOOK_SECONDS
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if not alive.issuperset(self.nodes) or (self.is_leaving and time.monotonic() > self._until):
            # Ray Train has its ranks killed and lets their places go; the third time it just ends.
            ray.cancel(self._task)

    def _told(self, job: Task) -> dict[str, Any]:
        """What the task and the ranks are told: plain values."""
        return {
            "run_dirs": [str(path) for path in job.run_dirs],
            "threads": job.threads,
            "nodes": self.nodes,
            "resources": {"GPU" if self.on_gpus else "CPU": self.shape.share},
            "folder": str(self._folder),
            "stop_file": str(self._stop_file),
            "log": str(log_path(job)),
        }


_TRAINER = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less to start
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",  # what ranks say goes to the Series' own logs
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(NO_NODE),
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a rank whose others died may never leave its collective
}


def _fit(told: Mapping[str, Any]) -> str:
    """The trainer's own process: what a worker answers, or "lost"."""
    log = Path(told["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with sent_to(log):
        try:
            return str(_trainer(told).fit().return_value)
        except Exception as error:
            print_traceback()
            if _ended_with(EXIT_NO_SPACE) in str(error):
                return "no_space"
            found_no_room = type(getattr(error, "controller_failure", None)).__name__ == NO_ROOM
            return "preempted" if found_no_room or _ended_with(EXIT_PREEMPTED) in str(error) else "lost"


def _trainer(told: Mapping[str, Any]) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    class GiveUpOnAFullDisk(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            del run_context
            for error in worker_exceptions.values():
                if _ended_with(EXIT_NO_SPACE) in str(error):
                    raise RuntimeError(str(error))

    nodes = told["nodes"]
    more = {"GLOO_SOCKET_IFNAME": "lo"} if len(set(nodes)) == 1 else {}
    environment = environment_of_rank(0, len(nodes), told["threads"], **more)
    return TorchTrainer(
        _train_rank,
        train_loop_config=dict(told),
        scaling_config=ScalingConfig(
            num_workers=len(nodes),
            use_gpu="GPU" in told["resources"],
            resources_per_worker=told["resources"],
            placement_strategy="PACK",
            label_selector=[{"ray.io/node-id": node} for node in nodes],
        ),
        run_config=RunConfig(
            name="ray-train",
            storage_path=told["folder"],
            failure_config=FailureConfig(max_failures=MOST_ATTEMPTS - 1, controller_failure_limit=0),
            worker_runtime_env={"env_vars": environment},
            callbacks=[GiveUpOnAFullDisk()],
        ),
    )


def _train_rank(told: Mapping[str, Any]) -> str:
    """What each rank does, in a thread beside its process's main one: what a fed worker does."""
    from harness.train.worker import begin, train_fed

    begin()
    try:
        return train_fed([Path(name) for name in told["run_dirs"]], StopFile(Path(told["stop_file"])))
    except SystemExit as end:  # the others may wait for this rank: Ray Train ends them all
        raise RuntimeError(_ended_with(end.code)) from end


def _ended_with(status: object) -> str:
    return f"a rank ended with status {status}."
