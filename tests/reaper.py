"""A process that waits for the end of a test run and kills the processes that the run leaves behind.

A run that is killed tears no fixture down, and daemons outlive the process that started them. Every process of a run
inherits one environment variable, by which the reaper finds it.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import uuid

import psutil

MARK = "SSMSCALE_TEST_RUN"


def start_reaper() -> None:
    """Mark the processes that this one starts from now on, and have them killed when it has ended."""
    if hasattr(os, "pidfd_open"):
        os.environ[MARK] = uuid.uuid4().hex
        command = [sys.executable, __file__, str(os.getpid())]
        subprocess.Popen(
            command, start_new_session=True
        )  # out of reach of a signal to the run's process group


def marked(mark: str, folders: set[str]) -> list[psutil.Process]:
    """Return the processes that were started with that mark, and add their working directories to `folders`.

    A shepherd of a SLURM job erases its environment; it works in a directory of its daemon's, which is in `folders`.
    """
    found = []
    for process in psutil.process_iter(["environ", "name", "cwd", "status"]):
        info = process.info
        is_shepherd = info["name"] == "slurmstepd" and info["cwd"] in folders
        if is_shepherd or (info["environ"] or {}).get(MARK) == mark:
            folders.add(info["cwd"])
            if info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process)
    return found


def main() -> None:
    """Wait for the process named on the command line, then kill until nothing with its mark is left."""
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        select.select([os.pidfd_open(int(sys.argv[1]))], [], [])
    folders: set[str] = set()
    while left := marked(os.environ[MARK], folders):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)


if __name__ == "__main__":
    main()
