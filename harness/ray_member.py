"""One `ray start` on a node, whose processes live and die together, and what is left of it when it is gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


class Member:
    """One `ray start --block` and what it started: a raylet and its agents, and with the head the control store."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, log_file: Path, environment: Mapping[str, str]
    ):
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.began = time.monotonic()
        self._raylet: psutil.Process | None = None
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, f"--temp-dir={folder}"]
        with log_file.open("ab") as said:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=environment,
                start_new_session=True,
                preexec_fn=_before_ray,  # noqa: PLW1509  this process has one thread
            )

    @property
    def address(self) -> str | None:
        """The control store's address once the node is registered there; None before."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "ray_current_cluster").read_text(encoding="utf-8").strip() or None
        return None

    @property
    def is_gone(self) -> bool:
        """Whether it does not serve as a node any more."""
        if self.process.poll() is not None:
            return True
        if self._raylet is None:
            self._raylet = next((child for child in below(self.process.pid) if _is_raylet(child)), None)
            return False
        # A raylet that ends in order leaves `ray start --block` behind.
        with contextlib.suppress(psutil.NoSuchProcess):
            return not self._raylet.is_running() or self._raylet.status() == psutil.STATUS_ZOMBIE
        return True

    def keep_logs(self, folder: Path) -> None:
        """Copy what Ray logged, which goes with its sockets."""
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(self.folder / "session_latest" / "logs", folder, dirs_exist_ok=True)

    def end(self) -> None:
        """End it and, by the kernel, what it started: there is nothing in Ray to be saved."""
        self.process.kill()
        self.process.wait()


def _before_ray() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # which is passed on through exec: it is meant for workers
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)


def below(pid: int) -> list[psutil.Process]:
    """A process's children and theirs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def is_ours(process: psutil.Process) -> bool:
    """Whether a process is the harness's own, which saves before it ends, and not Ray's."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(word.startswith("harness.") for word in process.cmdline())
    return False


def reap(members: Sequence[Member]) -> None:
    """Let go of orphans that have ended; those who were started here are waited for by name."""
    own = {member.process.pid for member in members}
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.pid not in own and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


def _is_raylet(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "raylet"
    return False
