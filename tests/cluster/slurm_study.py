"""A study on the devcluster, and what befalls it there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from harness.dispatch.arrays import Array, ArrayStore
from harness.dispatch.base import Task
from harness.record.journal import Event, read_progress
from harness.record.root import Root
from slurm.devcluster.cluster import DevCluster
from tests.checkouts import environment_of
from tests.conftest import REPOSITORY
from tests.harness.journals import read_events
from tests.studies import Fields
from tests.waiting import PACED, PATIENCE, wait_until

PROFILE: dict[str, Any] = {
    "name": "dev",
    "partitions": {"low": None},
    "nodes": 2,
    "gpus": 2,
    "gpu_memory_gib": 1,
    "cores": 4,
    "memory_gib": 4,
    "limits": {"hours": 1},
    "signal_seconds": 20,
}


@dataclass
class SlurmStudy:
    """A study, its cluster's profile, and the command that submits it."""

    cluster: DevCluster
    folder: Path
    fields: Fields
    profile: dict[str, Any] = field(default_factory=lambda: dict(PROFILE))
    code: Path = REPOSITORY
    """The checkout it is submitted from."""
    step_seconds: float = 0.0
    """What a step of training takes at least, so that whoever looks for one in time finds it."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study, self.profile_path = self.folder / "study.yaml", self.folder / "profile.yaml"
        self.study.write_text(yaml.safe_dump(self.fields, sort_keys=False), encoding="utf-8")
        self.profile_path.write_text(yaml.safe_dump(self.profile, sort_keys=False), encoding="utf-8")
        self.root = Root(self.folder / "runs")

    @property
    def environment(self) -> dict[str, str]:
        """What the command and the jobs it submits run under."""
        return {
            **environment_of(self.code),
            "PYTHONPATH": os.pathsep.join(map(str, [self.code, PACED])),
            **({"PACED_STEP_SECONDS": str(self.step_seconds)} if self.step_seconds else {}),
            **self.cluster.env,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start_submit(self, *options: str, on: str = "slurm") -> subprocess.Popen[str]:
        """`ssmscale submit` to the cluster as a process of its own."""
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "harness", "submit", str(self.study)),
                *("--on", on, "--cluster", str(self.profile_path), "--root", str(self.root.path)),
                *options,
            ],
            cwd=self.code,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )

    def submit(self, *options: str, on: str = "slurm") -> str:
        """Submit; returns what was said."""
        process = self.start_submit(*options, on=on)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
        return said

    def run(self, *arguments: str) -> str:
        """A verb of the command on this study."""
        verb, *rest = arguments
        done = subprocess.run(
            [sys.executable, "-m", "harness", verb, str(self.study), *rest, "--root", str(self.root.path)],
            cwd=self.code,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> Any:
        """The document of `status --json`."""
        return json.loads(self.run("status", "--json"))

    def refusal(self, *options: str, status: int = 2) -> str:
        """Submit and be refused with this exit status; returns what was said."""
        process = self.start_submit(*options)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == status, said
        return said

    def slurm(self, *command: str) -> str:
        """One of SLURM's own programs."""
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment, check=True, timeout=PATIENCE
        ).stdout

    def queue(self) -> list[str]:
        """Ids and states of the jobs that wait or run, array elements each for itself."""
        return self.slurm("squeue", "--noheader", "--array", "--format=%i %T").splitlines()

    def series(self) -> list[Path]:
        return sorted((self.root.path / "series").iterdir())

    def wait_for_step(self, step: int) -> None:
        """Return when any journal tells of that step."""
        wait_until(lambda: any(read_progress(folder).step >= step for folder in self.journals()))

    def tasks(self) -> dict[Path, Task]:
        """What each Series' newest job trains, by the Series' directory."""
        return {self.root.series(task.series_id): task for array in self.arrays() for task in array.tasks}

    def arrays(self) -> list[Array]:
        """The arrays submitted so far, oldest first."""
        return list(ArrayStore(self.root.study(self.fields["name"])).read().values())

    def job(self, series: Path) -> str:
        """SLURM's number of a Series' newest job."""
        ids = [
            array.job_of(index)
            for array in self.arrays()
            for index, task in enumerate(array.tasks)
            if task.series_id == series.name
        ]
        return ids[-1]

    def nodes(self) -> dict[Path, str]:
        """Where the jobs are that run or are just ending, by the Series' directory."""
        lines = self.slurm("squeue", "--noheader", "--array", "--format=%i %N").splitlines()
        held = dict(words for line in lines if len(words := line.split()) == 2)  # a job that waits is nowhere
        return {series: held[job] for series in self.tasks() if (job := self.job(series)) in held}

    def journals(self) -> list[Path]:
        """Every directory of the study that holds a journal."""
        return sorted([*self.root.path.glob("series/*"), *self.root.path.glob("runs/*")])

    def count(self, event: Event, **fields: Any) -> int:
        """How often an event with these fields was journalled."""
        told = (found for folder in self.journals() for found in read_events(folder))
        return sum(found["event"] == event and fields.items() <= found.items() for found in told)

    def ranks(self, series: Path) -> list[psutil.Process]:
        """The processes that train a Series, on whatever node."""
        run_dirs = set(map(str, self.tasks()[series].run_dirs))
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "harness.train.worker" in line and run_dirs & set(line) and "srun" not in line[0]:
                found.append(process)
        return found

    def controllers(self) -> list[psutil.Process]:
        """The processes that hand the study's Series to Ray."""
        mark = str(self.root.path.absolute())
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if "harness.dispatch.ray.controller" in (words := process.info["cmdline"] or [])
            and words[-1].startswith(mark)
        ]

    def hold(self, beyond: Mapping[Path, int]) -> dict[Path, list[psutil.Process]]:
        """Freeze the ranks of each Series as it passes a step of its trunk; returns them.

        What is to befall a job then finds it training, where its steps last long enough for it to be caught.
        """
        held: dict[Path, list[psutil.Process]] = {}

        def all_are_held() -> bool:
            for series, step in beyond.items():
                if series not in held and read_progress(series).step > step:
                    held[series] = self.ranks(series)
                    for process in held[series]:
                        process.suspend()
                    assert held[series], f"{series} was trained to its end before it could be held"
            return len(held) == len(beyond)

        wait_until(all_are_held, at_once=True)
        return held

    def make_room(self, node: str) -> None:
        """Have a job of higher priority take a whole node for a moment."""
        self.slurm(
            *("sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null"),
            *("--wrap", "true"),
        )

    def near_time_limit(self, series: Path) -> None:
        """Send a job's ranks what SLURM sends them when its time is nearly over: a limit is a minute at least."""
        self.slurm("scancel", "--signal=USR2", self.job(series))

    def wait_until_over(self) -> None:
        wait_until(lambda: not self.queue())


@contextmanager
def held_back(slurm: Callable[..., str]) -> Iterator[None]:
    """Jobs wait while the block runs, and those that run go on; `slurm` calls one of SLURM's programs."""
    slurm("scontrol", "update", "partitionname=low", "state=down")
    try:
        yield
    finally:
        slurm("scontrol", "update", "partitionname=low", "state=up")


Make = Callable[..., SlurmStudy]
"""The fixture `make`: a study's fields, a folder's name, and changes to the profile."""
