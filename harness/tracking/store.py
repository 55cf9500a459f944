"""MLflow's store: its address, and opening it safely, so that its tables are made once and never seen half made.

An address of a database may hold a password: it is shown through `redact` alone, and an error is one sentence.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from harness.common.validation import first_line
from harness.record.root import Root
from harness.study.schema import Study
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from sqlalchemy import URL

SQLITE = "sqlite:///"
DATABASES = ("postgresql", "sqlite", "mysql", "mssql")
"""Databases that MLflow keeps runs in."""
CONNECT_SECONDS = 10
"""Time for a database's host to answer at all."""


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`; an SQLite store that is not there yet is made first.

    Raises whatever MLflow raises where a database cannot be opened; a server is not asked before the first call.
    """
    be_quiet()
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:"):
        return MlflowClient(tracking_uri=with_driver(uri))
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that create a store at once break it, and so does one that is killed while it does.
    with FileLock(database.with_suffix(".lock")):
        if not database.exists():
            for left in database.parent.glob(f".{database.name}.*"):
                left.unlink()  # by one that was killed while it made the store
            draft = database.with_name(f".{database.name}.{uuid.uuid4().hex[:8]}")
            MlflowClient(tracking_uri=f"{SQLITE}{draft}").search_experiments(max_results=1)
            draft.replace(database)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        return client


def be_quiet() -> None:
    """Set what MLflow reads while it is imported: no telemetry, no long retries, no word on every table made."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # Standard output is for what was asked: a table, a JSON document.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A tracker that is gone is tried again by the next mirroring, not for minutes within one call; and a request that
    # failed may have been heard all the same, so that repeating it blindly would make a run twice.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def with_driver(uri: str) -> str:
    """The address with the driver that is installed: SQLAlchemy 2.1 takes postgresql:// alone for psycopg 3."""
    if uri.startswith("postgresql://") and find_spec("psycopg") is None:
        return uri.replace("postgresql://", "postgresql+psycopg2://", 1)
    return uri


def redact(uri: str) -> str:
    """A database's address as it may be shown: without its password, wherever in it that is."""
    hidden = re.sub(r"^((?:\w[\w+]*://)?[^:@/]*):.*@", r"\1:***@", uri)
    return re.sub(r"(?i)((?:password|passwd|pwd)=)[^&]*", r"\1***", hidden)


def prepare_database(uri: str, where: str) -> str:
    """Make sure that MLflow can keep runs in the database; returns its address with paths made absolute.

    Raises InputError, one sentence that begins with `where` and never holds the password, for an address of the
    wrong form, a database that cannot be reached, and tables that another version of MLflow made.
    """
    shown = f"{where} {redact(uri)}"
    uri = with_driver(uri)
    url = _parse(uri, shown)
    if url.get_backend_name() == "sqlite":
        uri = f"{SQLITE}{Path(str(url.database)).absolute()}"
    _reach(url, shown)
    be_quiet()
    from mlflow.exceptions import MlflowException

    try:
        connect(uri).search_experiments(max_results=1)
    except MlflowException as error:
        if "out-of-date database schema" in str(error):
            raise InputError(
                f"{shown}: its tables were made by another version of MLflow; back it up, then run "
                f"`mlflow db upgrade {redact(uri)}` (or install the MLflow that made them, where that is the newer one)"
            ) from error
        raise InputError(f"{shown}: {first_line(error, url.password)}") from error
    return uri


def _parse(uri: str, shown: str) -> URL:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    right = "right is postgresql://USER@HOST:PORT/NAME"
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError) as error:
        raise InputError(f"{shown}: is not the address of a database; {right}") from error
    kind = url.get_backend_name()
    if kind not in DATABASES:
        spelling = "is spelled postgresql://" if kind == "postgres" else "is nothing MLflow keeps runs in"
        raise InputError(f"{shown}: {kind}:// {spelling}; {right}")
    if not url.database or url.database == ":memory:":
        raise InputError(f"{shown}: names no database; {right}")
    return url


def _reach(url: URL, shown: str) -> None:
    """Raise InputError where the database does not answer; MLflow itself would try for minutes."""
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    kind = url.get_backend_name()
    if kind == "sqlite" and not Path(str(url.database)).exists():
        return
    patience = {"connect_timeout": CONNECT_SECONDS} if kind in {"postgresql", "mysql"} else {}
    try:
        engine = create_engine(url, connect_args=patience)
        try:
            inspect(engine).get_table_names()
        finally:
            engine.dispose()
    except NoSuchModuleError as error:
        raise InputError(f"{shown}: {url.drivername} is no driver of SQLAlchemy's") from error
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise InputError(f"{shown}: cannot be opened: {first_line(cause, url.password)}") from error


def default_uri(root: Root) -> str:
    """The SQLite store of a ROOT, used where nothing else is named."""
    return f"sqlite:///{(root.path / 'mlflow.db').absolute()}"


def tracking_uri(study: Study, root: Root) -> str:
    """Address a study is tracked at: its own `tracking.uri`, else MLFLOW_TRACKING_URI, else ROOT's SQLite store."""
    return study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(root)


def sidecar_uri(study: Study, root: Root) -> str | None:
    """Address that a mirror beside a worker may use, as launch.json keeps it.

    None for an SQLite file, which no other machine may open, and for an address that holds a password: every user of a
    shared ROOT may read launch.json. `ssmscale sync` mirrors then.
    """
    uri = tracking_uri(study, root)
    return None if uri.startswith("sqlite") or redact(uri) != uri else uri
