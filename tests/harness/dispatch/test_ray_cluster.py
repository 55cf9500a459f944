"""A Ray that the harness starts on this machine: isolated from other Rays, and ended with its parent process."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.dispatch.ray.host import LOOPBACK, RayDown, address_towards, offered_gpus, temporary_folder
from tests.harness.rays import Driver, Here
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def rays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Here, Here]]:
    """Start two Rays at once."""
    first = Here(tmp_path_factory.mktemp("first"), devices="2,3")
    second = Here(tmp_path_factory.mktemp("second"), devices="5,7")
    try:
        assert first.address.address != second.address.address
        yield first, second
    finally:
        first.stop()
        second.stop()


@pytest.fixture(scope="module")
def drivers(rays: tuple[Here, Here]) -> Iterator[tuple[Driver, Driver]]:
    """Start a driver on each."""
    first, second = (Driver(here.address) for here in rays)
    yield first, second
    for driver in (first, second):
        driver.end()


def test_two_rays_on_one_machine_share_no_port_and_offer_their_own_gpus(
    rays: tuple[Here, Here], drivers: tuple[Driver, Driver]
) -> None:
    for here, driver in zip(rays, drivers, strict=True):
        assert {name: (found.get("CPU"), found.get("GPU")) for name, found in driver.nodes().items()} == {
            here.address.node: (2.0, 2.0),
            f"{here.address.node}-head": (None, None),
        }
        assert driver.devices() == here.devices
        assert here.address.dashboard is here.address.tunnel() is None
    first, second = rays
    assert {host for host, _ in first.listening() | second.listening()} == {LOOPBACK}
    assert not {port for _, port in first.listening()} & {port for _, port in second.listening()}


def test_a_driver_with_the_token_of_another_ray_is_refused(rays: tuple[Here, Here]) -> None:
    first, second = rays
    assert stat.S_IMODE(first.address.token_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(first.address.temp_dir.parent.stat().st_mode) == 0o700
    status, said = Driver(first.address, RAY_AUTH_TOKEN_PATH=str(second.address.token_file)).end()
    assert status != 0
    assert "ConnectionError" in said or "authentication" in said.lower()


def test_ctrl_c_ends_one_ray_and_leaves_the_other_working(
    rays: tuple[Here, Here], drivers: tuple[Driver, Driver]
) -> None:
    first, second = rays
    drivers[0].end()
    assert first.raylets()
    assert first.interrupt() == "stopped\n"
    wait_until(first.is_gone)
    assert not (first.folder / "ray.json").exists()
    assert not first.address.token_file.exists()
    assert drivers[1].devices(share=0.5) == [second.devices[0]] * 2


def test_a_killed_raylet_is_replaced_when_its_workers_have_saved(
    rays: tuple[Here, Here], drivers: tuple[Driver, Driver], tmp_path: Path
) -> None:
    _, second = rays
    drivers[1].train(tmp_path / "state")
    _, raylet = second.raylets()
    raylet.kill()
    wait_until(lambda: len(second.raylets()) == 2 and raylet not in second.raylets())
    assert (tmp_path / "state").read_text() == "saved"
    assert drivers[1].devices(share=0.4) == [second.devices[0]] * 2  # and the driver goes on


def test_processes_outlive_a_killed_parent_only_to_save(
    rays: tuple[Here, Here], drivers: tuple[Driver, Driver], tmp_path: Path
) -> None:
    _, second = rays
    drivers[1].train(tmp_path / "state")
    assert second.raylets()
    second.kill()
    wait_until(second.is_gone)
    assert (tmp_path / "state").read_text() == "saved"


def test_sockets_go_where_their_paths_are_short_enough(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    folder = temporary_folder({"TMPDIR": str(long)})
    try:
        assert folder.parent == Path("/tmp")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        shutil.rmtree(folder)


def test_folders_of_processes_that_were_killed_go_and_those_in_use_stay() -> None:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as name:  # short enough for Ray's sockets
        there = {"TMPDIR": name}
        if (child := os.fork()) == 0:
            try:
                temporary_folder(there)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        (left,) = Path(name).iterdir()
        first = temporary_folder(there)
        assert not left.exists()
        second = temporary_folder(there)
        assert {first, second} == set(Path(name).iterdir())


def test_only_gpus_of_the_allocation_are_offered() -> None:
    assert offered_gpus({"CUDA_VISIBLE_DEVICES": "4,6", "SLURM_JOB_GPUS": "0,1"}, 2) == ["4", "6"]
    assert offered_gpus({"SLURM_JOB_GPUS": "2,3"}, 2) == ["2", "3"]
    assert offered_gpus({}, 2) is None
    assert offered_gpus({"CUDA_VISIBLE_DEVICES": "4"}, 0) == []
    with pytest.raises(RayDown, match="CUDA_VISIBLE_DEVICES=4: offers 1 of 2 GPUs"):
        offered_gpus({"CUDA_VISIBLE_DEVICES": "4"}, 2)


def test_an_unknown_host_is_named() -> None:
    assert address_towards([]) == address_towards(["localhost"]) == LOOPBACK
    with pytest.raises(RayDown, match=r"nowhere\.invalid: host .* does not know this name"):
        address_towards(["nowhere.invalid"])
