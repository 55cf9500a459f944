"""A test run that is killed leaves no server behind, and no process that a server started."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from slurm.devcluster.cluster import missing_programs
from tests.cluster.conftest import missing
from tests.conftest import REPOSITORY
from tests.reaper import marked
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

RUN = """\
import os, subprocess, time
from slurm.devcluster.cluster import DevCluster, Shape

def test_it(tmp_path):
    cluster = DevCluster(tmp_path / "cluster", Shape(nodes=1, accounting={accounting}))
    cluster.up()
    try:
        command = ["sbatch", "--output=/dev/null", "--wrap", "sleep 1000"]
        subprocess.run(command, env={{**os.environ, **cluster.env}}, check=True)
        with open("{told}.draft", "w") as file:
            file.write(f"{{os.environ['SSMSCALE_TEST_RUN']}}\\n{{cluster.home}}")
        os.rename("{told}.draft", "{told}")
        time.sleep(1000)
    finally:
        cluster.down()
"""
DAEMONS = {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"}
ENDINGS = {signal.SIGTERM: True, signal.SIGINT: False, signal.SIGKILL: False}
"""Signals, and whether the cluster keeps accounts, which costs seconds."""


def test_a_run_that_is_killed_leaves_no_process_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    if absent := missing_programs():
        missing(f"no {', '.join(absent)} on this machine")
    folder = tmp_path_factory.mktemp("killed")  # a short path: that of munge's socket may have 108 bytes
    runs = {ending: start_run(folder / ending.name, accounting) for ending, accounting in ENDINGS.items()}
    left = {}
    for ending, accounting in ENDINGS.items():
        told = folder / ending.name / "told"
        wait_until(lambda told=told, run=runs[ending]: told.exists() or run.poll() is not None)
        assert told.exists(), runs[ending].communicate()[0]
        left[ending] = partial(names, *told.read_text().split("\n"))
        expected = DAEMONS | ({"mariadbd", "slurmdbd"} if accounting else set())
        wait_until(lambda left=left[ending], expected=expected: expected <= left())
    for ending, run in runs.items():
        run.send_signal(ending)
    for ending, run in runs.items():
        run.communicate()
        wait_until(lambda left=left[ending]: not left())


def start_run(folder: Path, accounting: bool) -> subprocess.Popen[str]:
    """Start pytest on one test that starts a cluster and a job."""
    folder.mkdir()
    test = folder / "test_killed.py"
    test.write_text(RUN.format(accounting=accounting, told=folder / "told"), encoding="utf-8")
    options = f"-q -n 0 -p tests.conftest -p no:cacheprovider -c pyproject.toml --basetemp={folder / 'tmp'}"
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options.split(), str(test)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def names(mark: str, home: str) -> set[str]:
    """Return the names of the processes of a run whose cluster is in that directory."""
    return {process.info["name"] for process in marked(mark, {home})}
