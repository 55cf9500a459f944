"""The address of MLflow's store, and opening it so that its tables are created once and completely."""

from __future__ import annotations

import logging
import os
import sqlite3
import uuid
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

from harness.common.address import (
    has_password,
    is_sqlite,
    lasting,
    login_of,
    redact,
    sqlite_address,
    sqlite_file,
    without_login,
)
from harness.common.disk import make_folder, write_atomically
from harness.common.validation import first_line
from harness.record.root import Root
from harness.record.trust import with_login
from harness.study.schema import Study
from harness.tracking import watch as patience
from harness.tracking.watch import TABLES_SECONDS, TrackerSilent, Watch, WatchedClient
from ssmttm.errors import InputError
from ssmttm.locks import file_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from sqlalchemy import URL

ARTEFACTS = "mlflow-artifacts"
"""Folder of ROOT with the files of MLflow's runs, beside the store."""
OWN_STORE = "mlflow.db"
"""ROOT's own store."""
DATABASES = ("postgresql", "sqlite", "mysql", "mssql")
"""Databases in which MLflow keeps runs."""
REQUEST_SECONDS = 20
"""Longest pause of a server within one answer."""


def connect(uri: str, watch: Watch | None = None) -> MlflowClient:
    """Return a client of the store at `uri` whose calls are watched; create an SQLite store that does not exist.

    Raises MLflow's and SQLAlchemy's exceptions if a database cannot be opened; a server gets no request before the
    first call.
    """
    watch = watch or Watch()
    return cast("MlflowClient", WatchedClient(_connect(with_login(uri), watch), watch))


def _connect(uri: str, watch: Watch) -> MlflowClient:
    # Before MLflow, which takes seconds to import, and would try a database for minutes.
    with watch.waiting(patience.FIRST_SECONDS):
        if is_server(uri):
            _reach_server(uri)
        elif uri.startswith(DATABASES):
            reach_database(with_driver(uri))
    be_quiet()
    from mlflow import MlflowClient

    if is_server(uri) and has_password(uri):  # else MLflow's messages and links would hold the password
        user, password = login_of(uri)
        os.environ |= {"MLFLOW_TRACKING_USERNAME": user or "", "MLFLOW_TRACKING_PASSWORD": password or ""}
        uri = without_login(uri)
    database = sqlite_file(uri)
    if database is None:
        client = MlflowClient(tracking_uri=with_driver(uri))
        if uri.startswith(DATABASES):
            with watch.waiting(TABLES_SECONDS):
                client.search_experiments(max_results=1)
        return client
    make_folder(database.parent)
    # Two processes that create a store at once break it, and so does one that is killed meanwhile.
    with watch.waiting(TABLES_SECONDS), file_lock(database.with_suffix(".lock")):
        if not database.exists():
            for left in database.parent.glob(f".{database.name}.*"):
                left.unlink()  # of a process that was killed while it created the store
            draft = database.with_name(f".{database.name}.{uuid.uuid4().hex[:8]}")
            write_atomically(draft, b"")  # SQLite itself would make a file that its group cannot write
            MlflowClient(tracking_uri=sqlite_address(draft)).search_experiments(max_results=1)
            draft.replace(database)
        client = MlflowClient(tracking_uri=lasting(uri))
        client.search_experiments(max_results=1)
        if database.name == OWN_STORE and (database.parent / "studies").is_dir():
            _follow_root(database)
        return client


def _follow_root(database: Path) -> None:
    """Correct the places of files in a ROOT's own store that was moved or copied with it: MLflow keeps absolute paths.

    Another ROOT may use the store too: the files of an experiment stay at a place that has them, if this one does not.
    """
    own = database.parent / ARTEFACTS
    with closing(sqlite3.connect(database)) as store, store:
        rows = store.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
        for experiment, location in rows:
            old = Path(unquote(urlsplit(location or "").path))
            if not str(location).startswith("file:") or old.name != ARTEFACTS:
                continue
            if old.resolve() == own.resolve():
                continue
            runs = store.execute("SELECT run_uuid FROM runs WHERE experiment_id = ?", (experiment,))
            if any((old / run).exists() and not (own / run).exists() for (run,) in runs.fetchall()):
                continue
            store.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                (own.as_uri(), experiment),
            )
            store.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                (own.as_uri(), len(location) + 1, experiment, len(location), location),
            )


def be_quiet() -> None:
    """Configure MLflow before its import: no telemetry, no long retries, no log line for every table."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # Standard output is for results: a table, a JSON document.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # The next mirroring tries an unreachable tracker again, so no call repeats its request for minutes. A failed
    # request may have taken effect, and repeating it blindly would create a run twice.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    # Errors are raised too; the log would repeat each with its traceback.
    for noisy in ("alembic", "mlflow.store", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def with_driver(uri: str) -> str:
    """Name the installed driver in an address: SQLAlchemy 2.1 takes plain postgresql:// for psycopg 3."""
    kind, mark, rest = uri.partition("://")
    driver = "+psycopg2" if kind == "postgresql" and find_spec("psycopg") is None else ""
    return f"{kind}{driver}{mark}{rest}"


def prepare_database(uri: str, where: str) -> str:
    """Create MLflow's tables in a database if they are missing; return its address with absolute paths.

    Raises InputError, which begins with `where` and never holds the password, for an invalid address, a database that
    cannot be reached, and tables of another version of MLflow.
    """
    shown = f"{where} {redact(uri)}"
    uri = with_driver(with_login(uri))
    url = _parse(uri, shown)
    uri = lasting(uri)
    be_quiet()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DBAPIError, NoSuchModuleError, SQLAlchemyError

    watch = Watch()
    try:
        watch.call(lambda: connect(uri, watch))
    except NoSuchModuleError as error:
        raise InputError(f"{shown}: SQLAlchemy has no driver {url.drivername}") from error
    except (SQLAlchemyError, TrackerSilent) as error:
        cause = (error.orig if isinstance(error, DBAPIError) else None) or error
        raise InputError(f"{shown}: cannot be opened: {first_line(cause, url.password)}") from error
    except MlflowException as error:
        if "out-of-date database schema" in str(error):
            raise InputError(
                f"{shown}: another version of MLflow made its tables; back it up, then run "
                f"`mlflow db upgrade {redact(uri)}` (or install that version if it is newer)"
            ) from error
        raise InputError(f"{shown}: {first_line(error, url.password)}") from error
    return uri


def _parse(uri: str, shown: str) -> URL:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    right = "write postgresql://USER@HOST:PORT/NAME"
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError) as error:
        raise InputError(f"{shown}: not a database address; {right}") from error
    kind = url.get_backend_name()
    if kind not in DATABASES:
        raise InputError(f"{shown}: MLflow keeps no runs in {kind}://; {right}")
    if not url.database or url.database == ":memory:":
        raise InputError(f"{shown}: it names no database; {right}")
    return url


def _reach_server(uri: str) -> None:
    """Raise OSError unless a server accepts a request through the proxies that MLflow uses, whatever it answers."""
    from requests import RequestException, get
    from requests.exceptions import ConnectionError as NotConnected
    from requests.exceptions import SSLError

    try:
        address = f"{without_login(uri).rstrip('/')}/health"
        get(address, timeout=REQUEST_SECONDS, allow_redirects=False)
    except SSLError:
        pass  # MLflow has settings for certificates
    except NotConnected as error:
        cause = getattr(error.args[0] if error.args else None, "reason", None) or error
        raise OSError(
            str(cause).rpartition(" object at ")[2].partition(": ")[2] or first_line(error)
        ) from error
    except RequestException:
        pass  # MLflow's own request says what is wrong


def reach_database(uri: str) -> None:
    """Raise SQLAlchemy's exception if a database does not answer."""
    from sqlalchemy import create_engine, inspect

    file = sqlite_file(uri)
    if file is None or file.exists():
        engine = create_engine(uri)
        try:
            inspect(engine).get_table_names()
        finally:
            engine.dispose()


def is_server(uri: str) -> bool:
    """True if a store is a server, False if this process opens the database."""
    return uri.startswith(("http://", "https://"))


def default_uri(root: Root) -> str:
    """Return the address of ROOT's own SQLite store."""
    return sqlite_address(root.path / OWN_STORE)


def tracking_uri(study: Study, root: Root) -> str:
    """Return a study's tracking address: its `tracking.uri`, else MLFLOW_TRACKING_URI, else ROOT's SQLite store."""
    return study.tracking.uri or lasting(os.environ.get("MLFLOW_TRACKING_URI", "")) or default_uri(root)


def sidecar_uri(study: Study, root: Root) -> str | None:
    """Return the tracking address that launch.json gives to a worker's sidecar mirror.

    None for an SQLite file, which no other machine may open, and for an address with a password, since every user of a
    shared ROOT may read launch.json. `ssmscale sync` mirrors in both cases.
    """
    uri = tracking_uri(study, root)
    return None if is_sqlite(uri) or has_password(uri) else uri
