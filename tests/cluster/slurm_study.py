"""A study on the devcluster, and the faults that tests inflict on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import yaml

from harness.cli.app import main
from harness.dispatch.arrays import Array, ArrayStore
from harness.dispatch.base import Task
from harness.record.journal import Event, read_progress
from harness.record.root import Root
from slurm.devcluster.cluster import DevCluster
from tests.checkouts import environment_of
from tests.conftest import REPOSITORY, Answer
from tests.harness.journals import read_events
from tests.studies import Fields
from tests.waiting import PACED, PATIENCE, wait_until

PROFILE: dict[str, Any] = {
    "name": "dev",
    "partitions": {"low": None},
    "nodes": 2,
    "gpus": 2,
    "gpu_memory_gib": 1,
    "cores": 2,
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
    """Least time of a step of training, so that a test finds the job training."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study, self.profile_path = self.folder / "study.yaml", self.folder / "profile.yaml"
        self.study.write_text(yaml.safe_dump(self.fields, sort_keys=False), encoding="utf-8")
        self.profile_path.write_text(yaml.safe_dump(self.profile, sort_keys=False), encoding="utf-8")
        self.root = Root(self.folder / "runs")

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the command and of the jobs it submits."""
        return {
            **environment_of(self.code),
            "PYTHONPATH": os.pathsep.join(map(str, [self.code, PACED])),
            **({"PACED_STEP_SECONDS": str(self.step_seconds)} if self.step_seconds else {}),
            **self.cluster.env,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    # -- the command

    def start(self, verb: str, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Start a verb of the command on this study in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "harness", *self._words(verb, options)],
            cwd=self.code,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
        )

    def call(self, verb: str, *options: str) -> Answer:
        """Call a verb of the command on this study: in this process, but where the code is another checkout's."""
        if self.code != REPOSITORY:
            process = self.start(verb, *options)
            out, err = process.communicate(timeout=PATIENCE)
            return Answer(process.returncode, out, err)
        return self.call_words(*self._words(verb, options))

    def call_words(self, *words: str) -> Answer:
        """Call the command with these words in this process."""
        status: Any = 0
        with (
            patch.object(sys, "argv", ["ssmscale", *words]),
            patch.dict(os.environ, self.environment),
            chdir(self.code),
            redirect_stdout(StringIO()) as out_text,
            redirect_stderr(StringIO()) as err_text,
        ):
            try:
                main()
            except SystemExit as ended:
                status = ended.code or 0
        return Answer(status, out_text.getvalue(), err_text.getvalue())

    def _words(self, verb: str, options: tuple[str, ...]) -> list[str]:
        return [verb, str(self.study), *options, "--root", str(self.root.path)]

    def run(self, verb: str, *options: str) -> str:
        """Call a verb of the command; returns its standard output."""
        answer = self.call(verb, *options)
        assert answer.status == 0, answer.out + answer.err
        return answer.out

    def status(self) -> Any:
        """Return the document of `status --json`."""
        return json.loads(self.run("status", "--json"))

    def target(self, on: str = "slurm") -> tuple[str, ...]:
        """Return the options that name the cluster."""
        return ("--on", on, "--cluster", str(self.profile_path))

    def submit(self, *options: str, on: str = "slurm", status: int = 0) -> str:
        """Submit, and expect this exit status; returns all that was printed."""
        answer = self.call("submit", *self.target(on), *options)
        assert answer.status == status, answer.out + answer.err
        return answer.out + answer.err

    # -- SLURM

    def slurm(self, *command: str) -> str:
        """Call one of SLURM's own programs."""
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment, check=True, timeout=PATIENCE
        ).stdout

    def queue(self) -> list[str]:
        """Return the ids and states of the jobs that wait or run, each array element apart."""
        return self.slurm("squeue", "--noheader", "--array", "--format=%i %T").splitlines()

    def asked(self, job: str) -> str:
        """Return SLURM's description of a job, on one line."""
        return self.slurm("scontrol", "--oneliner", "show", "job", job)

    def make_room(self, node: str) -> None:
        """Have a job of higher priority take a whole node for a moment."""
        self.slurm(
            *("sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null"),
            *("--wrap", "true"),
        )

    def near_time_limit(self, series: Path) -> None:
        """Send a job's ranks the signal that SLURM sends near the time limit, which is a minute at least."""
        self.slurm("scancel", "--signal=USR2", self.job(series))

    def wait_until_over(self) -> None:
        """Return when the queue is empty."""
        wait_until(lambda: not self.queue())

    # -- ROOT

    def series(self) -> list[Path]:
        """Return the directories of the Series."""
        return sorted((self.root.path / "series").iterdir())

    def journals(self) -> list[Path]:
        """Return every directory of the study that holds a journal."""
        return sorted([*self.root.path.glob("series/*"), *self.root.path.glob("runs/*")])

    def arrays(self) -> list[Array]:
        """Return the arrays submitted so far, oldest first."""
        return list(ArrayStore(self.root.study(self.fields["name"])).read().values())

    def tasks(self) -> dict[Path, Task]:
        """Return the task of each Series' newest job, by the Series' directory."""
        return {self.root.series(task.series_id): task for array in self.arrays() for task in array.tasks}

    def job(self, series: Path) -> str:
        """Return SLURM's number of a Series' newest job."""
        ids = [
            array.job_of(index)
            for array in self.arrays()
            for index, task in enumerate(array.tasks)
            if task.series_id == series.name
        ]
        return ids[-1]

    def nodes(self) -> dict[Path, str]:
        """Return the nodes of the jobs that run or are just ending, by the Series' directory."""
        lines = self.slurm("squeue", "--noheader", "--array", "--format=%i %N").splitlines()
        held = dict(words for line in lines if len(words := line.split()) == 2)  # a waiting job has no node
        return {series: held[job] for series in self.tasks() if (job := self.job(series)) in held}

    def events(self, *kinds: Event) -> list[dict[str, Any]]:
        """Return the events of these kinds in all journals."""
        found = (event for folder in self.journals() for event in read_events(folder))
        return [event for event in found if event["event"] in kinds]

    def count(self, event: Event, **fields: Any) -> int:
        """Count the events that have these fields, in all journals."""
        return sum(fields.items() <= found.items() for found in self.events(event))

    def wait_for_step(self, step: int) -> None:
        """Return when any journal holds that step."""
        wait_until(lambda: any(read_progress(folder).step >= step for folder in self.journals()))

    # -- processes

    def ranks(self, series: Path) -> list[psutil.Process]:
        """Return the processes that train a Series, on any node."""
        run_dirs = set(map(str, self.tasks()[series].run_dirs))
        return [
            process
            for process, line in _command_lines()
            if "harness.train.worker" in line and run_dirs & set(line) and "srun" not in line[0]
        ]

    def controllers(self) -> list[psutil.Process]:
        """Return the processes that hand the study's Series to Ray."""
        mark = str(self.root.path.absolute())
        return [
            process
            for process, line in _command_lines()
            if "harness.dispatch.ray.controller" in line and any(word.startswith(mark) for word in line)
        ]

    def hold(self, beyond: Mapping[Path, int]) -> dict[Path, list[psutil.Process]]:
        """Suspend the ranks of each Series as it passes a step of its trunk; returns them.

        A fault then meets the job while it trains. Its steps must last long enough for it to be caught.
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


def wake(*ranks: psutil.Process) -> None:
    """Let suspended ranks go on."""
    for process in ranks:
        process.resume()


def _command_lines() -> list[tuple[psutil.Process, list[str]]]:
    return [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]


@contextmanager
def held_back(slurm: Callable[..., str]) -> Iterator[None]:
    """Keep jobs that wait from starting during the block; `slurm` calls one of SLURM's programs."""
    slurm("scontrol", "update", "partitionname=low", "state=down")
    try:
        yield
    finally:
        slurm("scontrol", "update", "partitionname=low", "state=up")


Make = Callable[..., SlurmStudy]
"""The fixture `make`: a study's fields, a folder's name, and changes to the profile."""
