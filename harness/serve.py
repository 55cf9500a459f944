"""`ssmscale serve`: MLflow's own server and page on a database, in the foreground until it is told to stop.

On this machine alone it asks for no password; where others can reach it, it asks for one that is made here. Secrets
travel by environment and by files of mode 0600, never on a command line, in a log or on the terminal.
"""

from __future__ import annotations

import errno
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness.credentials import make_credentials
from harness.mlflow_server import Server, end, is_loopback, start
from harness.rundir import Root
from harness.store import SQLITE, prepare_database, redact
from ssmttm.errors import InputError


@contextmanager
def serving(
    root: Root, database: str | None, host: str, port: int, allowed: Sequence[str], log: Path
) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """A server that answers, ended in order afterwards.

    `database` is SQLAlchemy's address (None: ROOT's SQLite store), `port` 0 takes a free one. Raises InputError, a
    sentence, for whatever keeps it from answering.
    """
    uri = database or f"{SQLITE}{(root.path / 'mlflow.db').absolute()}"
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


def password_on_show(database: str | None) -> bool:
    """Whether this process's command line holds the database's password, for every user of the machine to read."""
    return (
        database is not None and redact(database) != database and any(database in word for word in sys.argv)
    )


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
    """What the terminal shows: the address, then what jobs need of the environment."""
    shown = [server.address, f"export MLFLOW_TRACKING_URI={server.address}"]
    if server.credentials is not None:
        line = server.credentials.export_line()
        if show_password:
            word = shlex.quote(server.credentials.password)
            line = f"{line.partition('MLFLOW_TRACKING_PASSWORD=')[0]}MLFLOW_TRACKING_PASSWORD={word}"
        shown.append(line)
    return shown


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
