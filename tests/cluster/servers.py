"""Real servers as tests need them: started, stopped, killed, frozen and started again on the same port."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from slurm.devcluster.cluster import free_ports
from tests.waiting import PATIENCE, wait_until

PASSWORD = "a/secret%word"
"""With characters that an address must quote."""


def free_port() -> int:
    """Return a port of the loopback that neither another test nor the kernel gives to another process."""
    return free_ports(1)[0]


def addresses() -> list[str]:
    """Return the loopback's address and the first of this machine's own."""
    found = [
        one.address for of in psutil.net_if_addrs().values() for one in of if one.family.name == "AF_INET"
    ]
    return ["127.0.0.1", *[address for address in found if not address.startswith("127.")][:1]]


def postgres_binaries() -> Path | None:
    """Return the folder of PostgreSQL's programs, if this machine has them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = found[-1] if found else shutil.which("initdb")
    return Path(path).parent if path else None


class Postgres:
    """A PostgreSQL with files and a port of its own, for this machine alone."""

    def __init__(self, binaries: Path) -> None:
        self.binaries, self.port = binaries, free_port()
        # pytest's folders are closed to the server's user.
        self.folder = Path(tempfile.mkdtemp(prefix="ssmscale-postgres-"))
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            account = pwd.getpwnam("postgres")
            self._as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        password = self.folder / "password"
        password.write_text(PASSWORD, encoding="utf-8")
        password.chmod(0o644)
        subprocess.run(
            [
                *(binaries / "initdb", "--pgdata", self.folder / "data", "--username", "mlflow", "--no-sync"),
                *("--auth", "scram-sha-256", "--pwfile", password, "--encoding", "UTF8", "--no-locale"),
            ],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self._as,
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"postgresql://mlflow:a%2Fsecret%25word@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self.binaries / "postgres", "-D", self.folder / "data", "-p", str(self.port)),
                    *("-h", "127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"),
                ],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self._as,
            )
        wait_until(self.answers)

    def answers(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(self.uri).close()
        except psycopg2.OperationalError:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """End it; SIGQUIT is PostgreSQL's immediate mode, a crash in which connections just end."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(PATIENCE)
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)


class Served:
    """`ssmscale serve` in a process of its own, on the same port after each start."""

    def __init__(
        self, root: Path, study: Path, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        self.root, self.study, self.options = root, study, options
        self.environment = environment or {}
        self.port = free_port()
        self.told: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return str(self.told["address"])

    @property
    def login(self) -> tuple[str, str]:
        """The user and the password, from what it printed for its clients."""
        user = self.told["environment"]["MLFLOW_TRACKING_USERNAME"]
        return user, Path(self.told["password_file"]).read_text(encoding="utf-8").strip()

    @property
    def clients_environment(self) -> dict[str, str]:
        """The login as jobs and MLflow's clients get it."""
        user, password = self.login
        return {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "not started"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it; return when it answers, which its JSON document announces."""
        command = [sys.executable, "-m", "harness", "serve", str(self.study), "--root", str(self.root)]
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port), "--json", *self.options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
        )
        assert self.process.stdout is not None
        text = ""
        while (line := self.process.stdout.readline()) and line != "}\n":
            text += line
        assert line, self.process.communicate()[1]
        self.told = json.loads(text + line)

    def processes(self) -> list[psutil.Process]:
        """Return MLflow's own processes."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """End it as Ctrl-C or a scheduler would; returns its exit status and its standard error."""
        if self._process is None:
            return 0, ""
        if self.process.poll() is None:
            self.process.send_signal(how)
        _, said = self.process.communicate(timeout=PATIENCE)
        status, self._process = self.process.returncode, None
        return status, said

    def freeze(self) -> None:
        """Have it accept connections and answer no request."""
        for process in self.processes():
            process.suspend()

    def thaw(self) -> None:
        for process in self.processes():
            process.resume()

    def ask(
        self,
        path: str = "/api/2.0/mlflow/experiments/search?max_results=1",
        login: Sequence[str] | None = None,
        host: str | None = None,
    ) -> int:
        """Return the HTTP status of a request made over the loopback."""
        headers = {} if host is None else {"Host": host}
        return self.request("GET", path, login=login, headers=headers)[0]

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        login: Sequence[str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Send a request over the loopback, its path as it is written; return the answer's status and text."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        if login is not None:
            sent["Authorization"] = f"Basic {base64.b64encode(':'.join(login).encode()).decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, answer.read()
