"""The process of `ssmscale serve`: MLflow's tracking and page on a database, behind a login.

Every user of a machine reaches its loopback addresses, so that a server there has the login too. Secrets are passed
through the environment and files of mode 0600, never on a command line, in a log or on the terminal.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import ipaddress
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
from filelock import Timeout

from harness.common.address import is_sqlite, lasting, redact, sqlite_file
from harness.common.process import SAFE_PATH, ignoring, interpreter, start_logged, stop_when_parent_ends
from harness.record.root import Root
from harness.tracking.app import CREATE_EXPERIMENT, FORBIDDEN, HEALTH, OUTSIDE, SETTINGS, Settings
from harness.tracking.auth import Credentials
from harness.tracking.store import default_uri, prepare_database
from ssmttm.errors import InputError
from ssmttm.locks import file_lock

START_SECONDS = 300.0
"""Time for the server to answer; its imports take 5 s on an idle core."""
ANSWER_SECONDS = 60.0
"""Time for one answer: before the first, the server inspects its database."""
GRACE_SECONDS = 30.0
LOG_LINES = 8
EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"
KEPT_SETTINGS = ("MLFLOW_SQLALCHEMYSTORE_", "MLFLOW_UVICORN_OPTS")
"""The caller's MLFLOW_ variables that are passed on; the others configure clients or contradict this file's options."""


class ServerDied(OSError):
    """MLflow's server ended by itself."""


@dataclass(frozen=True)
class Server:
    """The address, database and log of one server."""

    root: Root
    database: str
    """SQLAlchemy address, password included."""
    host: str
    port: int
    allowed: tuple[str, ...]
    """Further host names that clients use."""
    log: Path
    credentials: Credentials | None
    """None for a server without a login."""

    @property
    def address(self) -> str:
        """Address for jobs: the host it listens on, or this machine's name if it listens on all."""
        host = self.host
        if _is_wildcard(host):
            name = socket.getfqdn()
            host = socket.gethostname() if name.startswith("localhost") else name
        return f"http://{_bracketed(host)}:{self.port}"


@contextmanager
def serving(
    root: Root,
    database: str | None,
    host: str,
    port: int,
    allowed: Sequence[str],
    log: Path,
    *,
    without_login: bool = False,
) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """Run a server during the block and yield it once it answers; raises InputError if it cannot answer.

    `database` is SQLAlchemy's address (None: ROOT's SQLite store); `port` 0 takes a free one.
    """
    uri = lasting(database) if database else default_uri(root)
    where = "--database" if database else "the store"
    root.path.mkdir(parents=True, exist_ok=True)
    with _lock(uri):
        port = choose_port(host, port)
        uri = prepare_database(uri, where)
        credentials = None if without_login else Credentials(root.path / "serve")
        server = Server(root, uri, host, port, tuple(allowed), log, credentials)
        begin = log.stat().st_size if log.exists() else 0
        process = start_logged(
            # Ctrl-C reaches this process alone, which then ends the server.
            interpreter("-m", "harness.tracking.server", *_arguments(server)),
            log,
            env=_environment(server),
        )
        try:
            _wait_until_it_answers(server, process, begin)
            yield server, process
        finally:
            end(process)


def stay(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Wait for the server to end by itself; raises ServerDied when it does."""
    begin = server.log.stat().st_size
    status = process.wait()
    raise ServerDied(f"MLflow's server ended by itself (status {status}); {_tail(server.log, begin)}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, wait for its open requests, then kill what is left of its session."""
    with ignoring(signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not leave orphans
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session holds no other process
        process.wait()


def describe(server: Server, study: str, *, show_password: bool) -> dict[str, object]:
    """Return the document of `ssmscale serve --json`."""
    login, environment = server.credentials, {"MLFLOW_TRACKING_URI": server.address}
    if login is not None:
        environment["MLFLOW_TRACKING_USERNAME"] = login.user
        if show_password:
            environment["MLFLOW_TRACKING_PASSWORD"] = login.password
    return {
        "study": study,
        "address": server.address,
        "environment": environment,
        "password_file": str(login.password_file) if login else None,
        "database": redact(server.database),
        "log": str(server.log),
    }


def lines(server: Server, *, show_password: bool) -> list[str]:
    """Return lines for the terminal: the address, then the shell commands that set what jobs need."""
    shown = [server.address, f"export MLFLOW_TRACKING_URI={server.address}"]
    if (login := server.credentials) is not None:
        password = f'"$(cat {shlex.quote(str(login.password_file))})"'
        if show_password:
            password = shlex.quote(login.password)
        shown.append(f"export MLFLOW_TRACKING_USERNAME={login.user} MLFLOW_TRACKING_PASSWORD={password}")
    host, proxies = urlsplit(server.address).hostname or "", urllib.request.getproxies()
    if {"http", "all"} & proxies.keys() and not urllib.request.proxy_bypass(host):
        shown.append(
            f'export no_proxy="{host},${{no_proxy:-$NO_PROXY}}"'
        )  # a proxy does not reach the server
    return shown


def password_on_show(database: str | None) -> bool:
    """True if this process's command line, which every user can read, holds the database's password."""
    return (
        database is not None and redact(database) != database and any(database in word for word in sys.argv)
    )


def choose_port(host: str, port: int) -> int:
    """Return the port to listen on, a free one for 0; raises InputError if host or port cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"--host {host}: unknown host name or address") from error
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                problem = f"--port {port}: another program listens there; --port 0 takes a free one"
            elif error.errno == errno.EACCES:
                problem = f"--port {port}: this user may not listen there; choose 1024 or above"
            else:
                problem = f"--host {host}: this machine cannot listen there ({error.strerror})"
            raise InputError(problem) from error
        return int(trial.getsockname()[1])


def check_refusals(server: Server) -> None:
    """Raise InputError if the server answers without a login, has a part that it must not have, or writes elsewhere."""
    outside = "/api/2.0/mlflow/" + CREATE_EXPERIMENT
    if server.credentials is not None:
        for method, path in (("GET", EXPERIMENTS), ("GET", "/"), ("POST", outside), *FORBIDDEN):
            if (status := _ask(server, method, path).status) != 401:
                raise InputError(f"stopped: the server answers {method} {path} without a login ({status})")
    for method, path in FORBIDDEN:
        if (status := _ask(server, method, path, login=True).status) != 404:
            raise InputError(f"stopped: the server has {method} {path}, which it must not have ({status})")
    answer = _ask(server, "POST", outside, login=True, document={"artifact_location": "/"})
    if answer.status != 400 or OUTSIDE not in answer.text:
        raise InputError(f"stopped: the server keeps artefacts in any folder ({answer.status})")


def is_loopback(host: str) -> bool:
    """True if only this machine can reach that address; of names, localhost alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _lock(uri: str) -> AbstractContextManager[object]:
    """Lock an SQLite file for one server, since two would wait for each other's transactions."""
    database = sqlite_file(uri)
    if database is None:
        return nullcontext()
    database.parent.mkdir(parents=True, exist_ok=True)
    try:
        return file_lock(database.with_suffix(".serve.lock"), wait=False).acquire()
    except Timeout as error:
        raise InputError(
            f"{database}: another `ssmscale serve` serves it; use that one or stop it"
        ) from error


def _wait_until_it_answers(server: Server, process: subprocess.Popen[bytes], begin: int) -> None:
    """Return once the server answers, reads its database and refuses what it must refuse."""
    deadline = time.monotonic() + START_SECONDS
    while (health := _ask(server, "GET", HEALTH).status) != 200:
        if process.poll() is not None:
            raise InputError(
                f"MLflow's server did not start (status {process.returncode}); {_tail(server.log, begin)}"
            )
        if time.monotonic() > deadline:
            raise InputError(
                f"MLflow's server at {server.address} did not answer within {START_SECONDS:.0f} s "
                f"({HEALTH}: {health or 'no answer'}); {_tail(server.log, begin)}"
            )
        time.sleep(0.1)
    check_refusals(server)
    if (status := _ask(server, "GET", EXPERIMENTS, login=True).status) != 200:
        raise InputError(
            f"MLflow's server does not read {redact(server.database)} (status {status}); "
            f"{_tail(server.log, begin)}"
        )


class Answer(NamedTuple):
    """The answer to one request."""

    status: int
    """0 if there is none."""
    text: str = ""


def _ask(
    server: Server,
    method: str,
    path: str,
    *,
    login: bool = False,
    document: Mapping[str, str] | None = None,
) -> Answer:
    """Send a request from this machine, without a proxy and, if the server has one, with the `login`."""
    host = "localhost" if _is_wildcard(server.host) else server.host
    body = json.dumps(document or {}).encode() if method != "GET" else None
    request = urllib.request.Request(f"http://{_bracketed(host)}:{server.port}{path}", body, method=method)
    request.add_header("Content-Type", "application/json")
    if login and server.credentials is not None:
        pair = f"{server.credentials.user}:{server.credentials.password}"
        request.add_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=ANSWER_SECONDS) as answer:
            return Answer(int(answer.status))
    except urllib.error.HTTPError as error:
        return Answer(int(error.code), error.read().decode(errors="replace"))
    except OSError:
        return Answer(0)


def _tail(log: Path, begin: int) -> str:
    """Return the last lines of a log, of those written after its first `begin` bytes."""
    with log.open("rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - 20_000))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return f"{log} ends:\n" + ("\n".join(lines[-LOG_LINES:]) or "(nothing)")


def _arguments(server: Server) -> list[str]:
    """Return the arguments of uvicorn."""
    many = not is_sqlite(server.database)
    workers = max(1, min(4, psutil.cpu_count() or 1)) if many else 1
    return [
        *("--factory", "harness.tracking.app:create_app"),
        # Requests come every few seconds for weeks: the log is for errors.
        *("--no-access-log", "--timeout-graceful-shutdown", "5"),
        *shlex.split(os.environ.get("MLFLOW_UVICORN_OPTS", "")),
        *("--host", server.host, "--port", str(server.port), "--workers", str(workers)),
    ]


def _names(server: Server) -> list[str]:
    """Return the host names that requests may carry; any other name that resolves to this server is an attack."""
    names = ["localhost", "127.0.0.1", "[::1]"]
    if not is_loopback(server.host):
        names += [_bracketed(server.host), socket.gethostname(), socket.getfqdn()]
        if _is_wildcard(server.host):
            names += [
                _bracketed(address.address.split("%")[0])
                for addresses in psutil.net_if_addrs().values()
                for address in addresses
                if address.family in {socket.AF_INET, socket.AF_INET6}
            ]
    return list(dict.fromkeys([*names, *server.allowed]))


def _environment(server: Server) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lstrip("_").startswith("MLFLOW_") or name.startswith(KEPT_SETTINGS)
    }
    names = _names(server)
    # The page's requests name its own address as their origin.
    origins = [origin for name in names for origin in (f"http://{name}:{server.port}", f"https://{name}")]
    settings = Settings(
        artefacts=str((server.root.path / "mlflow-artifacts").absolute()),
        origins=tuple(origins),
        password_file=str(server.credentials.password_file) if server.credentials else None,
    )
    ours = {
        SETTINGS: json.dumps(asdict(settings)),
        **SAFE_PATH,
        "MLFLOW_BACKEND_STORE_URI": server.database,
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join([*names, *(f"{name}:*" for name in names)]),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # evaluates language models
    }
    return kept | ours


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


if __name__ == "__main__":  # uvicorn's command, in a process that ends with its parent
    stop_when_parent_ends()
    runpy.run_module("uvicorn", run_name="__main__", alter_sys=True)
