"""The app of `ssmscale serve`: of MLflow's server, tracking, artefacts and the page, behind a login.

MLflow's own server brings more: an assistant that runs shell commands as the user who serves, a gateway to language
models, jobs, webhooks. This app mounts none of their routers, and answers 404 for every path and method that is not
listed here, so that an area of a later MLflow does not exist either. Paths are compared as uvicorn hands them to
MLflow, decoded once, and as a whole: another spelling of a path is another path.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from harness.common.process import stop_when_parent_ends
from harness.tracking.auth import is_login, read_password

SETTINGS = "SSMSCALE_SERVE"
"""Environment variable of the server's process that holds `Settings` as JSON."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = "/health"
"""The only path without a login: it tells that the server runs, and nothing else."""
CHALLENGE = (b"www-authenticate", b'Basic realm="ssmscale", charset="UTF-8"')
CREATE_EXPERIMENT, GRAPHQL = "experiments/create", "/graphql"
OUTSIDE = "artifact_location: experiments keep their artefacts below"
"""Beginning of the answer to an experiment with artefacts elsewhere."""
MOST_BYTES = 2**20
"""Size of a request whose body is checked; MLflow's page and clients send a few kilobytes."""

TRACKING = {
    "GET": (
        *("artifacts/list", "metrics/get-history", "metrics/get-history-bulk-interval", "runs/get"),
        *("experiments/get", "experiments/get-by-name", "experiments/search"),
    ),
    "POST": (
        *(CREATE_EXPERIMENT, "experiments/delete", "experiments/restore", "experiments/update"),
        *("experiments/search", "experiments/set-experiment-tag", "experiments/delete-experiment-tag"),
        *("runs/create", "runs/update", "runs/delete", "runs/restore", "runs/search", "runs/set-tag"),
        *("runs/delete-tag", "runs/log-metric", "runs/log-parameter", "runs/log-batch", "runs/log-inputs"),
    ),
}
"""Methods and names of the tracking API, below /api/2.0/mlflow/ for clients and /ajax-api/2.0/mlflow/ for the page."""
PAGE = {
    "GET": ("metrics/get-history-bulk", "model-versions/search"),
    "POST": ("experiments/search-datasets", "logged-models/search", "upload-artifact"),
}
"""Further names for the page alone. It searches for a run's models, of which there are none."""
PART = r"(?!\.{1,2}(?:/|$))[^/\\\x00-\x1f\x7f]+"
FILE = rf"{PART}(?:/{PART})*"
"""A relative path without empty, `.` and `..` parts."""
RUN_FILES = ("/get-artifact", "/artifacts/list", "/upload-artifact")
"""Requests for files of a run, which MLflow's server opens wherever the run has them."""
GRAPHQL_READS = frozenset({"mlflowGetRun", "mlflowGetExperiment"})
"""Fields that the pages of runs and experiments ask for by GraphQL; without them they show an error."""
FORBIDDEN = (
    ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
    ("PUT", "/ajax-api/3.0/mlflow/assistant/config"),
    ("POST", "/ajax-api/3.0/mlflow/assistant/message"),
    ("POST", "/gateway/mlflow/v1/chat/completions"),
    ("GET", "/ajax-api/3.0/mlflow/gateway/secrets/list"),
    ("POST", "/ajax-api/2.0/mlflow/gateway-proxy"),
    ("POST", "/ajax-api/3.0/jobs/"),
    ("POST", "/ajax-api/3.0/mlflow/jobs/search"),
    ("GET", "/ajax-api/3.0/mlflow/mcp-servers"),
    ("GET", "/graphql"),
    ("POST", "/v1/traces"),
    ("POST", "/api/3.0/mlflow/traces/search"),
    ("POST", "/ajax-api/2.0/mlflow/runs/create-promptlab-run"),
    ("POST", "/api/2.0/mlflow/webhooks"),
    ("POST", "/api/2.0/mlflow/model-versions/create"),
    ("POST", "/api/3.0/mlflow/scorers/register"),
    ("POST", "/api/2.0/mlflow/users/create"),
)
"""A request or two to each part of MLflow's server that must not exist here; `serve` tries them when it starts."""


def _alternatives(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names))


ALLOWED = {
    "GET": re.compile(
        rf"/|/version|/get-artifact|/static-files/{FILE}"
        rf"|/(?:ajax-)?api/2\.0/mlflow/(?:{_alternatives(TRACKING['GET'])})"
        rf"|/ajax-api/2\.0/mlflow/(?:{_alternatives(PAGE['GET'])})"
        rf"|/(?:ajax-)?api/2\.0/mlflow-artifacts/artifacts(?:/{FILE})?"
        r"|/(?:ajax-)?api/3\.0/mlflow/server-info"
    ),
    "POST": re.compile(
        rf"{GRAPHQL}"
        rf"|/(?:ajax-)?api/2\.0/mlflow/(?:{_alternatives(TRACKING['POST'])})"
        rf"|/ajax-api/2\.0/mlflow/(?:{_alternatives(PAGE['POST'])})"
    ),
    "PUT": re.compile(rf"/(?:ajax-)?api/2\.0/mlflow-artifacts/artifacts/{FILE}"),
}
ALLOWED["HEAD"] = ALLOWED["GET"]


def is_allowed(method: str, path: str) -> bool:
    """True if the app passes requests with this method and decoded path to MLflow."""
    paths = ALLOWED.get(method)
    is_listed = paths is not None and paths.fullmatch(path) is not None
    return is_listed and re.search("%[0-9a-fA-F]{2}", path) is None  # MLflow would decode it again


def is_inside(location: str, folder: Path) -> bool:
    """True if an artefact location is in MLflow's proxied store or below `folder`, in plain spelling."""
    for base in ("mlflow-artifacts:", folder.as_uri(), str(folder)):
        if location.startswith(base):
            rest = location.removeprefix(base)
            return rest in {"", "/"} or re.fullmatch(rf"/(?!.*[%?#;]){FILE}/?", rest) is not None
    return False


def may_serve(location: str, folder: Path) -> bool:
    """True unless a run's artefact location is a local path outside of `folder`, after all links."""
    parts = urlsplit(location)
    if parts.scheme not in {"", "file"}:
        return True
    path = Path(url2pathname(parts.path) if parts.scheme else location)
    return path.resolve().is_relative_to(folder.resolve())


def reads_only(document: object) -> bool:
    """True if a GraphQL request consists of the page's queries."""
    from graphql import FieldNode, FragmentDefinitionNode, GraphQLError, OperationDefinitionNode, parse
    from graphql.language import OperationType

    try:
        definitions = parse(document["query"]).definitions if isinstance(document, dict) else ()
    except (GraphQLError, KeyError, TypeError):
        return False
    operations = [one for one in definitions if not isinstance(one, FragmentDefinitionNode)]
    return bool(operations) and all(
        isinstance(one, OperationDefinitionNode)
        and one.operation is OperationType.QUERY
        and all(
            isinstance(field, FieldNode) and field.name.value in GRAPHQL_READS
            for field in one.selection_set.selections
        )
        for one in operations
    )


class Guard:
    """Passes to MLflow's app the requests that have the login, come from no other site, and are on the list."""

    def __init__(self, app: Asgi, password: str | None, artefacts: Path, origins: Sequence[str]) -> None:
        self._app, self._password, self._artefacts = app, password, artefacts
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path, headers = scope["method"], scope["path"], dict(scope["headers"])
        if path == HEALTH and method in {"GET", "HEAD"}:
            await _send(send, 200, b"OK")
        elif self._is_cross_site(method, headers):
            await _refuse(send, 403, "PERMISSION_DENIED", "another site's page may not use this server")
        elif self._password is not None and not is_login(headers.get(b"authorization", b""), self._password):
            await _refuse(send, 401, "UNAUTHENTICATED", "this server needs a user and a password", CHALLENGE)
        elif not is_allowed(method, path):
            await _refuse(send, 404, "ENDPOINT_NOT_FOUND", f"this server has no {method} {path}")
        elif path == GRAPHQL or path.endswith(f"/{CREATE_EXPERIMENT}"):
            await self._check_body(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_cross_site(self, method: str, headers: Mapping[bytes, bytes]) -> bool:
        """True if a browser sends a request for a page of another site, to which it would add the login.

        Another port is another site: on a shared machine it is another user's. A link to the page is none.
        """
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1") not in self._origins:
            host = headers.get(b"host", b"").decode("latin-1")
            if not host or urlsplit(origin.decode("latin-1")).netloc != host:
                return True
        is_link = method == "GET" and headers.get(b"sec-fetch-dest") == b"document"
        return not is_link and headers.get(b"sec-fetch-site", b"none") not in {b"none", b"same-origin"}

    async def _check_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if its document asks for nothing outside of tracking and the served folder."""
        body, more = b"", True
        while more and len(body) <= MOST_BYTES:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if (problem := self._problem(scope["path"], body)) is not None:
            await _refuse(send, 400, "INVALID_PARAMETER_VALUE", problem)
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, again, send)

    def _problem(self, path: str, body: bytes) -> str | None:
        """Return why a request is refused, as a sentence; None if it is not."""
        if len(body) > MOST_BYTES:
            return f"the request is longer than {MOST_BYTES} bytes"
        try:
            document = json.loads(body)  # as MLflow reads it, which names keys in two ways
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            return "the request is not a JSON object"
        if path == GRAPHQL:
            known = ", ".join(sorted(GRAPHQL_READS))
            return None if reads_only(document) else f"GraphQL here has only queries of {known}"
        for key, value in document.items():
            if key.replace("_", "").lower() != "artifactlocation" or value in (None, ""):
                continue
            if not isinstance(value, str) or not is_inside(value, self._artefacts):
                return f"{OUTSIDE} {self._artefacts}; leave artifact_location out, and the server chooses"
        return None


def _mistake(code: str, message: str) -> dict[str, str]:
    """Return a document as MLflow answers a mistake, which its clients show."""
    return {"error_code": code, "message": message}


async def _refuse(send: Send, status: int, code: str, message: str, *headers: tuple[bytes, bytes]) -> None:
    text = json.dumps(_mistake(code, message)).encode()
    await _send(send, status, text, (b"content-type", b"application/json"), *headers)


async def _send(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    usual = [(b"content-length", str(len(body)).encode()), (b"x-content-type-options", b"nosniff")]
    await send({"type": "http.response.start", "status": status, "headers": [*usual, *headers]})
    await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True)
class Settings:
    """Settings that `ssmscale serve` gives to the server's process, beside MLflow's own."""

    artefacts: str
    """Absolute path of the served folder."""
    origins: tuple[str, ...]
    """Addresses of the page."""
    password_file: str | None
    """None for a server without a login."""


def create_app() -> Asgi:
    """Return the app with the Settings in this process's environment."""
    stop_when_parent_ends()
    for handler in logging.getLogger("uvicorn").handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    settings = Settings(**json.loads(os.environ[SETTINGS]))
    artefacts, file = Path(settings.artefacts), settings.password_file
    password = None if file is None else read_password(Path(file))
    return Guard(_mlflow(artefacts), password, artefacts, settings.origins)


def _mlflow(artefacts: Path) -> Asgi:
    """Return the tracking API, artefacts and the page of MLflow's server, with its checks of hosts and origins."""
    import flask
    from fastapi import FastAPI
    from fastapi.middleware.wsgi import WSGIMiddleware
    from mlflow import server
    from mlflow.exceptions import MlflowException
    from mlflow.server import constants, handlers
    from mlflow.server.artifact_router import artifact_router
    from mlflow.server.fastapi_security import init_fastapi_security

    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: os.environ["MLFLOW_BACKEND_STORE_URI"],
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: artefacts.as_uri(),
    }

    def refuse_other_folders() -> flask.Response | None:
        """Refuse the files of a run of another server, or of an earlier one, that it keeps in any folder."""
        if not flask.request.path.endswith(RUN_FILES):
            return None
        named = [*flask.request.args.getlist("run_id"), *flask.request.args.getlist("run_uuid")]
        if not named:  # MLflow also reads the body of a GET
            return flask.make_response(_mistake("INVALID_PARAMETER_VALUE", "name the run in the query"), 400)
        for run_id in named:
            with contextlib.suppress(MlflowException):  # MLflow answers that it has no such run
                location = handlers._get_tracking_store().get_run(run_id).info.artifact_uri
                if not may_serve(location, artefacts):
                    problem = f"run {run_id} keeps its artefacts in {location}, outside of {artefacts}"
                    return flask.make_response(_mistake("PERMISSION_DENIED", problem), 403)
        return None

    server.app.before_request(refuse_other_folders)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    init_fastapi_security(app)
    app.include_router(artifact_router)  # streams files, which the rest of MLflow's server holds in memory
    app.mount("/", WSGIMiddleware(server.app))
    return app
