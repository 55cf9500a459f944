"""The process of a node from which ranks are forked, imports done: `python -m harness.dispatch.rank_server SOCKET_FD`.

A rank spends 4 s of a core on importing torch and DeepSpeed, each anew, and every change of a group's size starts new
ones; forked from here they are up in a tenth of a second and share what is imported. What a fork must not find here is
not here: no thread of Python's or of OpenMP's (one thread is asked for while importing, and each rank says for itself
how many it wants), and no CUDA. A rank that cannot use its GPU, or finds that this process took the machine for one
without, starts as a plain process after all.

Whoever asks connects to the socket: one connection a rank, for as long as the rank is wanted. It sends the environment
with the rank's standard input, output and error, may send signals, and is told the exit status. When a connection
ends, whoever held it is gone, and the rank is asked to stop as it would be by the kernel were it the asker's child.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import struct
import sys
from types import FrameType
from typing import NoReturn

MESSAGE_BYTES = 1 << 17
"""The longest message: an environment."""
PLAIN = [sys.executable, "-m", "harness.worker", "--feed"]
"""The command of a rank that is a process of its own from the start."""


def main() -> None:
    """Import what a rank needs, then fork one for each connection, until whoever started this process ends."""
    from harness.training.preemption import stop_when_parent_ends

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
    for name in ("torch._dynamo", "ssmttm.model", "harness.worker", "harness.training.loop"):
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
            from harness.output import end_at_once
            from harness.worker import main as work

            end_at_once(work(["--feed"]))
        except BaseException:
            from harness.output import print_traceback

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


if __name__ == "__main__":
    main()
