"""Memory and cores are what cgroups, ulimit and SLURM leave of the machine, and kills for memory are recognised."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.common.limits import oom_kills, usable_memory
from harness.plan.cluster import this_machine
from ssmttm import limits
from ssmttm.limits import usable_cores

MIB = 2**20


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /proc/self and of the cgroups' mounts, which a test fills."""
    monkeypatch.setattr(limits, "PROC", tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path


def mount(kernel: Path, cgroup: str, *mounts: str) -> None:
    (kernel / "cgroup").write_text(cgroup + "\n")
    (kernel / "mountinfo").write_text("".join(f"30 20 0:1 {line}\n" for line in mounts))


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_smallest_limit_from_the_own_cgroup_up_to_the_root_counts(kernel: Path) -> None:
    mount(kernel, "0::/user.slice/job", f"/ {kernel}/cg rw shared:4 - cgroup2 cgroup2 rw")
    write(
        kernel / "cg" / "user.slice" / "job",
        memory__max="max",
        memory__high=str(900 * MIB),
        cpu__max="max 100000",
    )
    write(kernel / "cg" / "user.slice", memory__max=str(700 * MIB), cpu__max="100000 100000")
    write(kernel / "cg" / "user.slice" / "job", memory__events="low 0\noom 4\noom_kill 3")
    assert usable_memory() == 700 * MIB
    assert (usable_cores(), oom_kills()) == (1, 3)
    here = this_machine()
    assert (here.memory_gib, here.cores) == (700 / 1024, 1)


def test_a_kill_in_a_step_beside_the_batch_script_of_the_same_job_is_seen(kernel: Path) -> None:
    mount(kernel, "0::/job_7/step_batch", f"/ {kernel}/cg rw shared:4 - cgroup2 cgroup2 rw")
    write(kernel / "cg" / "job_7" / "step_batch", memory__events="oom 0\noom_kill 0")
    write(kernel / "cg" / "job_7", memory__events="oom 0\noom_kill 0")
    before = oom_kills()
    write(kernel / "cg" / "job_7" / "step_0", memory__events="oom 1\noom_kill 1")
    write(kernel / "cg" / "job_7", memory__events="oom 1\noom_kill 1")  # counts what is below, too
    assert oom_kills() > before


def test_version_1_has_a_hierarchy_for_each_controller(kernel: Path) -> None:
    mount(
        kernel,
        "9:memory:/box\n3:cpuacct,cpu:/box\n0::/",
        f"/ {kernel}/memory rw - cgroup cgroup rw,memory",
        f"/ {kernel}/cpu rw - cgroup cgroup rw,cpuacct,cpu",
    )
    write(kernel / "memory" / "box", memory__limit_in_bytes=str(600 * MIB), memory__oom_control="oom_kill 2")
    write(kernel / "memory", memory__limit_in_bytes="9223372036854771712")
    write(kernel / "cpu" / "box", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    write(kernel / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert usable_memory() == 600 * MIB
    assert (usable_cores(), oom_kills()) == (1, 2)


@pytest.mark.parametrize("own", ["/docker/abc", "/", "/../other"])
def test_a_container_whose_mount_begins_at_its_own_cgroup_is_limited_there(kernel: Path, own: str) -> None:
    mount(kernel, f"9:memory:{own}", f"/docker/abc {kernel}/memory ro - cgroup cgroup rw,memory")
    write(kernel / "memory", memory__limit_in_bytes=str(500 * MIB))
    assert usable_memory() == 500 * MIB


def test_without_cgroups_the_machine_and_the_allocation_count(
    kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert usable_memory() <= psutil.virtual_memory().total
    assert usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "400")
    assert usable_memory() > 400 * MIB  # of a session that is over
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert usable_memory() == 400 * MIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    assert usable_memory() > 400 * MIB


def test_a_ulimit_counts() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); "
        "from harness.common.limits import usable_memory; print(usable_memory())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 2**30


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A cgroup in which processes may take 200 MiB."""
    folders = [folder for folder in limits.cgroups("memory") if (folder / "memory.limit_in_bytes").exists()]
    if not folders or os.geteuid() != 0:
        pytest.skip("needs root, and version 1 of cgroups")
    folder = folders[-1] / f"ssmscale-test-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            if (folder / name).exists():
                (folder / name).write_text(str(200 * MIB))
        yield folder
    finally:
        folder.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_is_told_from_one_that_is_killed(
    small_cgroup: Path, tmp_path: Path
) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
from harness.dispatch import worker_process
from harness.dispatch.worker_process import RankProcess, state_at_end
Path({str(small_cgroup)!r}, "tasks").write_text(str(os.getpid()))
for program, number in (("bytearray(2**29)", 0), ("input()", signal.SIGKILL)):
    worker_process.PLAIN = [sys.executable, "-c", program]
    rank = RankProcess({{}}, Path({str(tmp_path)!r}) / "log")
    if number:
        rank.signal(number)
    rank._process.wait(60)
    print(state_at_end({{rank.status}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.split() == ["out_of_memory", "lost"], done.stderr
