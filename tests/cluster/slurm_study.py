"""A study on the devcluster, and what befalls it there."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from harness.journal import Event, Progress, read_events, read_progress
from harness.rundir import Root
from slurm.devcluster.cluster import DevCluster
from tests.checkouts import environment_of
from tests.cluster.servers import wait_until
from tests.conftest import REPOSITORY

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
    fields: dict[str, Any]
    profile: dict[str, Any] = field(default_factory=lambda: dict(PROFILE))
    code: Path = REPOSITORY
    """The checkout it is submitted from."""

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
            **self.cluster.env,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def start_submit(self, *options: str) -> subprocess.Popen[str]:
        """`ssmscale submit --on slurm` as a process of its own."""
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "harness", "submit", str(self.study)),
                *("--on", "slurm", "--cluster", str(self.profile_path), "--root", str(self.root.path)),
                *options,
            ],
            cwd=self.code,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )

    def submit(self, *options: str) -> str:
        """Submit; returns what was said."""
        process = self.start_submit(*options)
        said, _ = process.communicate(timeout=120)
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
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def slurm(self, *command: str) -> str:
        """One of SLURM's own programs."""
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment, check=True, timeout=60
        ).stdout

    def queue(self) -> list[str]:
        """Ids and states of the jobs that wait or run, array elements each for itself."""
        return self.slurm("squeue", "--noheader", "--array", "--format=%i %T").splitlines()

    def series(self) -> list[Path]:
        return sorted((self.root.path / "series").iterdir())

    def progress(self) -> list[Progress]:
        """Every journal of the study."""
        folders = [*self.root.path.glob("series/*"), *self.root.path.glob("runs/*")]
        return [read_progress(folder) for folder in folders]

    def step(self) -> int:
        """The furthest step any journal tells of."""
        return max((progress.step for progress in self.progress()), default=0)

    def count(self, event: Event) -> int:
        """How often an event was journalled."""
        folders = [*self.root.path.glob("series/*"), *self.root.path.glob("runs/*")]
        return sum(found["event"] == event for folder in folders for found in read_events(folder))

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, on whatever node."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if (
                "harness.worker" in line
                and any(str(self.root.path) in word for word in line)
                and "srun" not in line[0]
            ):
                found.append(process)
        return found

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        wait_until(lambda: self.step() >= step, seconds)

    def make_room(self) -> None:
        """Have a job of higher priority take both nodes for a moment."""
        self.slurm(
            *("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"),
            *("--wrap", "sleep 1"),
        )

    def kill_a_rank(self) -> None:
        """End one rank with SIGKILL."""
        self.ranks()[-1].send_signal(signal.SIGKILL)

    def wait_until_over(self, seconds: float = 240) -> None:
        wait_until(lambda: not self.queue(), seconds)


Make = Callable[..., SlurmStudy]
"""The fixture `make`: a study's fields, a folder's name, and changes to the profile."""
