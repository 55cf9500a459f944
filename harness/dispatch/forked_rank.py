"""A node's rank server as seen by who asks it for ranks, and a rank of it with the face of subprocess.Popen."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from harness.dispatch.rank_server import MESSAGE_BYTES


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
                [sys.executable, "-m", "harness.dispatch.rank_server", str(listener.fileno())],
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
