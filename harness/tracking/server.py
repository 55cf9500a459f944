"""MLflow's own server and page on a database, as a process of `ssmscale serve`.

A server that only this machine reaches asks for no password; one that others can reach asks for one that is made here.
Secrets travel by environment and by files of mode 0600, never on a command line, in a log or on the terminal.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import ipaddress
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from harness.common.process import stop_when_parent_ends
from harness.record.root import Root
from harness.tracking.auth import Credentials, make_credentials
from harness.tracking.store import SQLITE, default_uri, prepare_database, redact
from ssmttm.errors import InputError

START_SECONDS = 300.0
"""The server imports for 5 s on an idle core; a busy machine takes its time."""
ANSWER_SECONDS = 60.0
"""Time for one answer: its first makes the server get to know its database."""
GRACE_SECONDS = 30.0
LOG_LINES = 8
KEPT_SETTINGS = ("MLFLOW_SQLALCHEMYSTORE_", "MLFLOW_UVICORN_OPTS")
"""Of the caller's MLFLOW_ variables: the others speak of MLflow as a client, or would undo what is decided here."""


class ServerDied(OSError):
    """MLflow's server ended by itself."""


@dataclass(frozen=True)
class Server:
    """A server as it is asked for: its address, its database, its log."""

    root: Root
    database: str
    """SQLAlchemy's address, password and all."""
    host: str
    port: int
    allowed: tuple[str, ...]
    """Further names by which clients call it."""
    log: Path
    credentials: Credentials | None

    @property
    def address(self) -> str:
        """Address for jobs: from this machine where it listens here alone, else from anywhere by its name."""
        return f"http://{_bracketed(_reachable(self.host))}:{self.port}"

    def environment(self) -> dict[str, str]:
        """Variables that jobs need to find it; the password stays in its file."""
        found = {"MLFLOW_TRACKING_URI": self.address}
        return found | ({"MLFLOW_TRACKING_USERNAME": self.credentials.user} if self.credentials else {})


@contextmanager
def serving(
    root: Root, database: str | None, host: str, port: int, allowed: Sequence[str], log: Path
) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """A server that answers, ended in order afterwards.

    `database` is SQLAlchemy's address (None: ROOT's SQLite store), `port` 0 takes a free one. Raises InputError, a
    sentence, for whatever keeps it from answering.
    """
    uri = database or default_uri(root)
    where = "--database" if database else "the store"
    root.path.mkdir(parents=True, exist_ok=True)
    with _alone_on(uri):
        port = choose_port(host, port)
        uri = prepare_database(uri, where)
        credentials = None if is_loopback(host) else make_credentials(root.path / "serve")
        server = Server(root, uri, host, port, tuple(allowed), log, credentials)
        process = start(server)
        try:
            yield server, process
        finally:
            end(process)


def start(server: Server) -> subprocess.Popen[bytes]:
    """Start MLflow's server and return once it answers; raises InputError, and leaves nothing, where it does not."""
    server.log.parent.mkdir(parents=True, exist_ok=True)
    with server.log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.tracking.server", *_arguments(server)],
            env=_environment(server),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is for us: we end it, in order
        )
    try:
        _wait_until_it_answers(server, process, begin)
    except BaseException:
        end(process)
        raise
    return process


def stay(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Wait for the server to end by itself; raises ServerDied when it does."""
    begin = server.log.stat().st_size
    status = process.wait()
    raise ServerDied(
        f"MLflow's server ended by itself (status {status}); {server.log} ends:\n{_tail(server.log, begin)}"
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to finish what it answers, wait, and leave none of its processes behind."""
    # Impatience must not leave orphans.
    previous = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: nobody else is in it
        process.wait()
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


def describe(server: Server, study: str, *, show_password: bool) -> dict[str, object]:
    """The --json document."""
    environment = server.environment()
    if show_password and server.credentials is not None:
        environment["MLFLOW_TRACKING_PASSWORD"] = server.credentials.password
    return {
        "study": study,
        "address": server.address,
        "environment": environment,
        "password_file": str(server.credentials.password_file) if server.credentials else None,
        "database": redact(server.database),
        "log": str(server.log),
    }


def lines(server: Server, *, show_password: bool) -> list[str]:
    """Lines for the terminal: the address, then the variables that jobs need."""
    shown = [server.address, f"export MLFLOW_TRACKING_URI={server.address}"]
    if server.credentials is not None:
        line = server.credentials.export_line()
        if show_password:
            word = shlex.quote(server.credentials.password)
            line = f"{line.partition('MLFLOW_TRACKING_PASSWORD=')[0]}MLFLOW_TRACKING_PASSWORD={word}"
        shown.append(line)
    return shown


def password_on_show(database: str | None) -> bool:
    """True if this process's command line holds the database's password, for every user of the machine to read."""
    return (
        database is not None and redact(database) != database and any(database in word for word in sys.argv)
    )


def choose_port(host: str, port: int) -> int:
    """The port to listen on, a free one for 0; raises InputError where host or port is not to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"--host {host}: is neither a name nor an address that is known here") from error
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                problem = f"--port {port}: another program listens there; --port 0 takes a free one"
            elif error.errno == errno.EACCES:
                problem = f"--port {port}: may not be listened on by this user; 1024 and above may"
            else:
                problem = f"--host {host}: cannot be listened on ({error.strerror})"
            raise InputError(problem) from error
        return int(trial.getsockname()[1])


def is_loopback(host: str) -> bool:
    """True if only this machine can reach that address; a name other than localhost may mean anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _alone_on(uri: str) -> Iterator[None]:
    """One server an SQLite file: two would wait for each other's locks, and both say that they are the one."""
    if not uri.startswith(SQLITE):
        yield
        return
    database = Path(uri.removeprefix(SQLITE)).absolute()
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(database.with_suffix(".serve.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            f"{database}: is served by another `ssmscale serve` already; use that one, or end it first"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _wait_until_it_answers(server: Server, process: subprocess.Popen[bytes], begin: int) -> None:
    """Return once the server answers, reads its database and keeps strangers out."""
    deadline = time.monotonic() + START_SECONDS
    while (health := _ask(server, "/health")) != 200:
        if process.poll() is not None:
            raise InputError(
                f"MLflow's server did not start (status {process.returncode}); "
                f"{server.log} ends:\n{_tail(server.log, begin)}"
            )
        if time.monotonic() > deadline:
            raise InputError(
                f"MLflow's server at {server.address} did not answer within {START_SECONDS:.0f} s "
                f"(/health: {health or 'no answer'}); {server.log} ends:\n{_tail(server.log, begin)}"
            )
        time.sleep(0.1)
    experiments = "/api/2.0/mlflow/experiments/search?max_results=1"
    held = server.credentials
    if held is not None and _ask(server, experiments) != 401:
        raise InputError("MLflow's server answers without a password, so it is not served to others")
    status = _ask(server, experiments, (held.user, held.password) if held else None)
    if held is not None and status == 401:
        users = held.password_file.with_name("auth.db")
        raise InputError(
            f"{held.password_file}: MLflow refuses this password; {users} holds another: delete both to begin anew"
        )
    if status != 200:
        raise InputError(
            f"MLflow's server does not read {redact(server.database)} (status {status}); "
            f"{server.log} ends:\n{_tail(server.log, begin)}"
        )


def _ask(server: Server, path: str, login: tuple[str, str] | None = None) -> int:
    """The status of a request made from this machine, past any proxy; 0 where nothing answers."""
    host = "localhost" if _is_wildcard(server.host) else server.host
    request = urllib.request.Request(f"http://{_bracketed(host)}:{server.port}{path}")
    if login is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(login).encode()).decode())
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=ANSWER_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return 0


def _tail(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - 20_000))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-LOG_LINES:]) or "(nothing)"


def _arguments(server: Server) -> list[str]:
    many = not server.database.startswith(SQLITE)
    workers = max(1, min(4, psutil.cpu_count() or 1)) if many else 1
    names = _names(server)
    # Requests come every few seconds for weeks: the log is for what goes wrong.
    quiet = f"--no-access-log --timeout-graceful-shutdown 5 {os.environ.get('MLFLOW_UVICORN_OPTS', '')}"
    arguments = {
        "--host": server.host,
        "--port": str(server.port),
        "--workers": str(workers),
        "--artifacts-destination": (server.root.path / "mlflow-artifacts").absolute().as_uri(),
        "--default-artifact-root": "mlflow-artifacts:/",
        "--allowed-hosts": ",".join([*names, *(f"{name}:*" for name in names)]),
        # The page sends its own address as the origin of what it asks for.
        "--cors-allowed-origins": ",".join(
            origin for name in names for origin in (f"http://{name}:{server.port}", f"https://{name}")
        ),
        "--uvicorn-opts": quiet.strip(),
    }
    if server.credentials is not None:
        arguments["--app-name"] = "basic-auth"
    return ["server", "--serve-artifacts", *(word for pair in arguments.items() for word in pair)]


def _names(server: Server) -> list[str]:
    """Names by which clients may call it; a page of another name that leads here is an attack."""
    names = ["localhost", "127.0.0.1", "[::1]"]
    if server.credentials is not None:
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
    ours = {
        "MLFLOW_BACKEND_STORE_URI": server.database,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # judges of language models: nothing here asks for them
    }
    return kept | ours | (server.credentials.server_environment() if server.credentials else {})


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _reachable(host: str) -> str:
    if not _is_wildcard(host):
        return host
    name = socket.getfqdn()
    return socket.gethostname() if name.startswith("localhost") else name


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


if __name__ == "__main__":  # MLflow's own command, which ends with the process that started it
    stop_when_parent_ends()
    runpy.run_module("mlflow", run_name="__main__", alter_sys=True)
