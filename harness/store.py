"""MLflow's store opened safely: whoever comes first makes the tables, once, and nobody sees them half made."""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`; an SQLite store that is not there yet is made first.

    Raises whatever MLflow raises where a database cannot be opened; a server is not asked before the first call.
    """
    be_quiet()
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:"):
        return MlflowClient(tracking_uri=uri)
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that create a store at once break it, and so does one that is killed while it does.
    with FileLock(database.with_suffix(".lock")):
        if not database.exists():
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
    # A tracker that is gone is tried again by the next mirroring, not for minutes within one call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
