"""`ssmscale serve` and MLflow's processes end together, whichever of them is killed."""

from __future__ import annotations

import signal

import pytest

from tests.cluster.servers import Served
from tests.waiting import PATIENCE, is_running, wait_until

pytestmark = pytest.mark.cluster


def test_a_server_that_dies_is_told_with_the_end_of_its_log(postgres_server: Served) -> None:
    for process in postgres_server.processes():
        process.kill()
    postgres_server.process.wait(PATIENCE)
    status, said = postgres_server.stop()
    assert status == 1
    assert said.startswith("error: MLflow's server ended by itself (status -9); ")
    assert "mlflow-server.log ends:" in said


def test_a_server_whose_command_is_killed_does_not_stay_behind(sqlite_server: Served) -> None:
    held = sqlite_server.processes()
    assert len(held) == 2  # MLflow's own command, and uvicorn
    sqlite_server.stop(signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, held)))
