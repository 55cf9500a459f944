"""The process of a node from which ranks are forked, imports done: `python -m harness.dispatch.fork_server SOCKET_FD`.

A rank spends 4 s of a core on importing torch and DeepSpeed, each anew, and every change of a group's size starts new
ones; forked from here they are up in a tenth of a second and share what is imported. What a fork must not find here is
not here: no thread of Python's or of OpenMP's (one thread is asked for while importing, and each rank says for itself
how many it wants), and no CUDA. A rank that cannot use its GPU, or finds that this process took the machine for one
without, starts as a plain process after all.

Whoever asks connects to the socket: one connection a rank, for as long as the rank is wanted. It sends the environment
with the rank's standard input, output and error, may send signals, and is told the exit status. When a connection
ends, whoever held it is gone, and the rank is asked to stop as it would be by the kernel were it the asker's child.

A node's rank server as seen by who asks it for ranks, and a rank of it with the face of subprocess.Popen.
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
from types import FrameType
from typing import IO, NoReturn

MESSAGE_BYTES = 1 << 17
"""The longest message: an environment."""
PLAIN = [sys.executable, "-m", "harness.train.worker", "--feed"]
"""The command of a rank that is a process of its own from the start."""


def main() -> None:
    """Import what a rank needs, then fork one for each connection, until whoever started this process ends."""
    from harness.common.process import stop_when_parent_ends

    stop_when_parent_ends()
    for number in (signal.SIGINT, signal.SIGUSR2):  # meant for ranks, where they are meant for anybody
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(fileno=int(sys.argv[1]))
    _Server(listener, on_cuda=_import_all()).serve()


def _import_all() -> bool:
    """Returns whether DeepSpeed was imported for CUDA: it decides so once."""
    # torch would ask the driver whether there is a GPU, and no process forked thereafter could use one.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    from ssmttm.compat import without_mlflow

    on_cuda = torch.cuda.is_available()
    if not on_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with without_mlflow():
        importlib.import_module("deepspeed")
    # torch._dynamo is what an optimiser's first step imports, for 1.5 s of a core.
    for name in ("torch._dynamo", "ssmttm.model.music_lm", "harness.train.worker", "harness.train.loop"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is never collected is never copied either
    return on_cuda


class _Server:
    def __init__(self, listener: socket.socket, *, on_cuda: bool) -> None:
        self._listener, self._on_cuda = listener, on_cuda
        self._asked: dict[socket.socket, int] = {}
        """The rank's process by its connection."""
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()

    def serve(self) -> None:
        for end in (self._woken, self._wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, _nothing)
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
                    self._hear(key.fileobj)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        asker = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", asker)[1] != os.getuid():  # anybody may connect
            connection.close()
            return
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> None:
        if connection.fileno() < 0:  # its rank was found to have ended in the same round
            return
        if connection in self._asked:
            try:
                said = connection.recv(MESSAGE_BYTES)
            except OSError:
                said = b""
            if said:
                os.kill(self._asked[connection], json.loads(said)["signal"])
                return
            os.kill(self._asked[connection], signal.SIGTERM)
        else:
            said, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
            if len(descriptors) == 3:
                self._asked[connection] = self._fork(json.loads(said), descriptors)
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
            for held in (self._listener, self._woken, self._wake, *self._asked):
                held.close()
            os.environ.clear()
            os.environ.update(environment)
            if not self._can_stay():
                os.execve(sys.executable, PLAIN, environment)  # noqa: S606
            if not self._on_cuda:
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            random.seed()
            from harness.common.process import end_at_once
            from harness.train.worker import main as work

            end_at_once(work(["--feed"]))
        except BaseException:
            from harness.common.process import print_traceback

            print_traceback()
        os._exit(1)

    def _can_stay(self) -> bool:
        """Whether a forked rank finds the GPU that it is to have, and nothing where there is none."""
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
                for connection in [held for held, rank in self._asked.items() if rank == child]:
                    with contextlib.suppress(OSError):
                        connection.send(json.dumps({"status": status}).encode())
                    self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        self._asked.pop(connection, None)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """A signal that is ignored would wake nobody."""


class RankServer:
    """Starts a rank server; it ends, and its ranks save and end, with the thread that made it.

    Raises OSError on a system other than Linux, which lacks what it needs.
    """

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.address = f"\0ssmscale-ranks-{uuid.uuid4()}"  # Linux keeps it without a file
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides all GPUs from whoever holds none
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, log.open("ab") as said:
            listener.bind(self.address)
            listener.listen(128)  # who asks before it has made its imports waits for them
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.dispatch.fork_server", str(listener.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=environment,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    @property
    def is_alive(self) -> bool:
        """Whether it is there."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it; ranks that are still there are asked to stop."""
        if self.is_alive:
            self._process.terminate()
        self._process.wait()


class ForkedRank:
    """A rank forked by a rank server. Raises OSError where there is none at the address."""

    def __init__(self, address: str, environment: Mapping[str, str], log: IO[bytes]) -> None:
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(address)
        child_reads, ours = os.pipe()
        self.stdin: IO[bytes] = os.fdopen(ours, "wb")
        theirs, child_writes = os.pipe()
        self.stdout: IO[bytes] = os.fdopen(theirs, "rb")
        try:
            descriptors = [child_reads, child_writes, log.fileno()]
            socket.send_fds(self._server, [json.dumps(dict(environment)).encode()], descriptors)
        finally:
            os.close(child_reads)
            os.close(child_writes)

    def poll(self) -> int | None:
        """Its exit status; None while it is there."""
        return self._status(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit status. Raises subprocess.TimeoutExpired."""
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        with contextlib.suppress(OSError):
            self._server.send(json.dumps({"signal": int(number)}).encode())

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _status(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], seconds)[0]:
            try:
                said = self._server.recv(MESSAGE_BYTES)
            except OSError:
                said = b""
            # A server that says nothing more is gone, and has had its ranks told to stop.
            self.returncode = json.loads(said)["status"] if said else -int(signal.SIGTERM)
            self._server.close()
        return self.returncode


if __name__ == "__main__":
    main()
