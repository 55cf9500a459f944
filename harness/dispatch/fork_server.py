"""A rank server: a process of a node that makes the imports once and forks ranks, which start in a tenth of a second.

    python -m harness.dispatch.fork_server SOCKET_FD

A rank that starts as a plain process spends 4 s of a core on importing torch and DeepSpeed, and every change of a
group's size starts new ranks. The server has nothing that a fork may not inherit: no thread of Python's or of OpenMP's
(it imports with one thread, and each rank sets its own number), and no CUDA context. A rank that cannot use its GPU,
or has one while the server imported DeepSpeed for CPUs, replaces itself by a plain process.

A client opens one connection for each rank and keeps it as long as it wants the rank. It sends the environment with
the rank's standard input, output and error, may send signals, and receives the exit status. When the connection ends,
the server asks the rank to stop, as the kernel would if the rank were the client's child.

RankServer starts the server, and ForkedRank is the client, with the interface of subprocess.Popen.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NoReturn

from harness.common.disk import appending
from harness.common.process import (
    end_at_once,
    interpreter,
    print_traceback,
    start_logged,
    stop_when_parent_ends,
)

MESSAGE_BYTES = 1 << 17
"""Size of the longest message, an environment."""
PLAIN = interpreter("-m", "harness.train.worker", "--feed")
"""Command of a rank that is started as a plain process."""


def main() -> None:
    """Import what a rank needs, then fork a rank for each connection until the parent process ends."""
    stop_when_parent_ends()
    for number in (signal.SIGINT, signal.SIGUSR2):  # meant for ranks at most
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(fileno=int(sys.argv[1]))
    _Server(listener, on_cuda=_import_all()).serve()


def _import_all() -> bool:
    """Import what a rank needs; returns True if DeepSpeed was imported for CUDA, a choice it makes once."""
    # Without this torch asks the CUDA driver for GPUs, and no process forked afterwards can use one.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    from ssmttm.compat import without_mlflow

    on_cuda = torch.cuda.is_available()
    if not on_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with without_mlflow():
        importlib.import_module("deepspeed")
    # An optimiser's first step imports torch._dynamo, which takes 1.5 s of a core.
    for name in ("torch._dynamo", "ssmttm.model.music_lm", "harness.train.worker", "harness.train.loop"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, the pages that ranks share
    return on_cuda


class _Server:
    def __init__(self, listener: socket.socket, *, on_cuda: bool) -> None:
        self._listener, self._on_cuda = listener, on_cuda
        self._ranks: dict[socket.socket, int] = {}
        """Process id of each rank, by its connection."""
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()

    def serve(self) -> None:
        for end in (self._woken, self._wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # an ignored signal would not wake the selector
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
                    self._reap()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._receive(key.fileobj)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        client = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", client)[1] != os.getuid():  # other users can connect too
            connection.close()
            return
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        if connection.fileno() < 0:  # closed in the same round, because its rank had ended
            return
        if connection in self._ranks:
            try:
                message = connection.recv(MESSAGE_BYTES)
            except OSError:
                message = b""
            if message:
                os.kill(self._ranks[connection], json.loads(message)["signal"])
                return
            os.kill(self._ranks[connection], signal.SIGTERM)
        else:
            message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
            if len(descriptors) == 3:
                self._ranks[connection] = self._fork(json.loads(message), descriptors)
                return
        self._drop(connection)

    def _fork(self, environment: dict[str, str], descriptors: list[int]) -> int:
        child = os.fork()
        if child == 0:
            self._be_rank(environment, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        return child

    def _be_rank(self, environment: dict[str, str], descriptors: list[int]) -> NoReturn:
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for standard, descriptor in enumerate(descriptors):
                os.dup2(descriptor, standard)
                os.close(descriptor)
            self._selector.close()
            for held in (self._listener, self._woken, self._wake, *self._ranks):
                held.close()
            os.environ.clear()
            os.environ.update(environment)
            if not self._finds_its_device():
                os.execve(sys.executable, PLAIN, environment)  # noqa: S606
            if not self._on_cuda:
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            random.seed()
            from harness.train.worker import main as work

            end_at_once(work(["--feed"]))
        except BaseException:
            print_traceback()
        os._exit(1)

    def _finds_its_device(self) -> bool:
        """Return True if this rank can use its GPU, or has none and the server imported DeepSpeed for CPUs."""
        import torch

        try:
            if torch.cuda.is_available():
                torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            return torch.cuda.is_available() == self._on_cuda
        except RuntimeError:
            return False

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                child, status = ended[0], os.waitstatus_to_exitcode(ended[1])
                for connection in [held for held, rank in self._ranks.items() if rank == child]:
                    with contextlib.suppress(OSError):
                        connection.send(json.dumps({"status": status}).encode())
                    self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        self._ranks.pop(connection, None)


class RankServer:
    """A rank server, started on construction; it ends with the thread that started it, and its ranks save and end.

    Raises OSError on systems other than Linux.
    """

    def __init__(self, log: Path) -> None:
        self.address = f"\0ssmscale-ranks-{uuid.uuid4()}"  # an abstract address of Linux, without a file
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides all GPUs from actors that hold none
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(128)  # clients that connect before the imports are made wait
            self._process = start_logged(
                interpreter("-m", "harness.dispatch.fork_server", str(listener.fileno())),
                log,
                env=environment,
                pass_fds=[listener.fileno()],
            )

    @property
    def is_alive(self) -> bool:
        """True if it runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it, and have its ranks save and end."""
        if self.is_alive:
            self._process.terminate()
        self._process.wait()


class ForkedRank:
    """A rank forked by a rank server. Raises OSError if there is no server at the address."""

    def __init__(self, address: str, environment: Mapping[str, str], log: Path) -> None:
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(address)
        child_reads, ours = os.pipe()
        self.stdin: IO[bytes] = os.fdopen(ours, "wb")
        theirs, child_writes = os.pipe()
        self.stdout: IO[bytes] = os.fdopen(theirs, "rb")
        try:
            with appending(log) as output:
                descriptors = [child_reads, child_writes, output]
                socket.send_fds(self._server, [json.dumps(dict(environment)).encode()], descriptors)
        finally:
            os.close(child_reads)
            os.close(child_writes)

    def poll(self) -> int | None:
        """Return its exit status; None while it runs."""
        return self._status(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit status. Raises subprocess.TimeoutExpired."""
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal if it runs."""
        with contextlib.suppress(OSError):
            self._server.send(json.dumps({"signal": int(number)}).encode())

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _status(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], seconds)[0]:
            try:
                message = self._server.recv(MESSAGE_BYTES)
            except OSError:
                message = b""
            # If the server has ended, the kernel has asked its ranks to stop.
            self.returncode = json.loads(message)["status"] if message else -int(signal.SIGTERM)
            self._server.close()
        return self.returncode


if __name__ == "__main__":
    main()
