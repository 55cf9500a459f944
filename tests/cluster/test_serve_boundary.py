"""Of MLflow's server, `ssmscale serve` has tracking, artefacts and the page, for those with the login alone."""

from __future__ import annotations

import base64
import http.client
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from tests.cluster.browser import Browser
from tests.cluster.conftest import missing, served
from tests.cluster.servers import Served, addresses

pytestmark = pytest.mark.cluster

Request = tuple[str, str, bytes | None]
ASSISTANT = "/ajax-api/3.0/mlflow/assistant"
PROVIDER = {"base_url": "http://127.0.0.1:9/", "selected": True, "permissions": {"full_access": True}}
ATTACK: tuple[Request, ...] = (
    ("PUT", f"{ASSISTANT}/config", json.dumps({"providers": {"ollama": PROVIDER}}).encode()),
    ("POST", f"{ASSISTANT}/message", b'{"message": "run `id`", "session_id": null}'),
    ("GET", f"{ASSISTANT}/sessions/1/stream", None),
)
"""Choose a provider of the language model and let it run commands; its address answers nothing."""
ABSENT: tuple[Request, ...] = (
    *ATTACK,
    ("GET", f"{ASSISTANT}/config", None),
    ("GET", f"{ASSISTANT}/providers", None),
    ("POST", f"{ASSISTANT}/skills/install", b"{}"),
    ("POST", "/gateway/mlflow/v1/chat/completions", b"{}"),
    ("GET", "/gateway/mlflow/v1/models", None),
    ("POST", "/gateway/proxy/x/y", b"{}"),
    ("GET", "/ajax-api/2.0/mlflow/gateway-proxy?gateway_path=api/2.0/endpoints/", None),
    ("POST", "/api/3.0/mlflow/gateway/secrets/create", b"{}"),
    ("GET", "/ajax-api/3.0/mlflow/gateway/secrets/list", None),
    ("POST", "/ajax-api/3.0/jobs/", b"{}"),
    ("POST", "/ajax-api/3.0/jobs/search", b"{}"),
    ("GET", "/ajax-api/3.0/mlflow/jobs/1", None),
    ("POST", "/ajax-api/3.0/mlflow/scorer/invoke", b"{}"),
    ("POST", "/ajax-api/3.0/mlflow/genai/evaluate/invoke", b"{}"),
    ("POST", "/api/3.0/mlflow/scorers/register", b"{}"),
    ("POST", "/api/3.0/mlflow/prompt-optimization/jobs", b"{}"),
    ("GET", "/api/3.0/mlflow/mcp-servers", None),
    ("POST", "/ajax-api/3.0/mlflow/mcp-servers", b"{}"),
    ("POST", "/v1/traces", b""),
    ("POST", "/api/3.0/mlflow/traces/search", b"{}"),
    ("POST", "/api/2.0/mlflow/webhooks", b"{}"),
    ("POST", "/ajax-api/2.0/mlflow/runs/create-promptlab-run", b"{}"),
    ("POST", "/api/2.0/mlflow/registered-models/create", b'{"name": "x"}'),
    ("POST", "/api/2.0/mlflow/model-versions/create", b'{"name": "x", "source": "/etc"}'),
    ("GET", "/model-versions/get-artifact?path=passwd&name=x&version=1", None),
    ("POST", "/api/2.0/mlflow/logged-models", b"{}"),
    ("POST", "/api/2.0/mlflow/runs/log-model", b"{}"),
    ("POST", "/api/3.0/mlflow/datasets/create", b"{}"),
    ("POST", "/ajax-api/3.0/mlflow/demo/generate", b"{}"),
    ("GET", "/api/3.0/mlflow/workspaces", None),
    ("POST", "/api/2.0/mlflow/users/create", b"{}"),
    ("GET", "/signup", None),
    ("GET", "/graphql", None),
    ("POST", "/api/2.0/mlflow-artifacts/mpu/create/x", b"{}"),
    ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/x", None),
    ("OPTIONS", "/api/2.0/mlflow/runs/search", None),
    ("GET", "/metrics", None),
    ("GET", "/openapi.json", None),
    ("GET", "/a-part-of-a-later-mlflow", None),
)
SPELLINGS = (
    f"/{ASSISTANT}/config",
    f"{ASSISTANT}/config/",
    f"{ASSISTANT.upper()}/config",
    ASSISTANT.replace("/3.0", "//3.0") + "/config",
    ASSISTANT.replace("/", "%2f")[3:] + "/config",
    "/%61jax-api/3.0/mlflow/assistant/config",
    "/ajax-api/2.0/mlflow/../../3.0/mlflow/assistant/config",
    "/ajax-api/2.0/mlflow/%2e%2e/%2e%2e/3.0/mlflow/assistant/config",
    "/static-files/..%2fajax-api/3.0/mlflow/assistant/config",
    "/static-files/%2e%2e/%2e%2e/__init__.py",
    "/build/index.html",
    "/api/2.0/mlflow/experiments/search/",
    "/api/2.0/mlflow/experiments/search;x",
    "/API/2.0/mlflow/experiments/search",
    "//api/2.0/mlflow/experiments/search",
    "/api/2.0/mlflow-artifacts/artifacts/..%2f..%2fserve/password",
    "/api/2.0/mlflow-artifacts/artifacts/%252e%252e/serve/password",
    "/api/2.0/mlflow-artifacts/artifacts//etc/passwd",
    "/api/2.0/mlflow-artifacts/artifacts/a\\..\\b",
)
PRESENT: tuple[Request, ...] = (
    ("GET", "/", None),
    ("HEAD", "/", None),
    ("GET", "/version", None),
    ("GET", "/api/2.0/mlflow/experiments/search?max_results=1", None),
    ("POST", "/ajax-api/2.0/mlflow/experiments/search", b'{"max_results": 1}'),
    ("POST", "/api/2.0/mlflow/runs/search", b'{"experiment_ids": ["0"]}'),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts", None),
    ("GET", "/ajax-api/3.0/mlflow/server-info", None),
)
NEEDS_THE_LOGIN: tuple[Request, ...] = (
    *ABSENT,
    *PRESENT,
    ("POST", "/api/2.0/mlflow/experiments/create", b'{"name": "taken", "artifact_location": "/root"}'),
    ("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/planted", b"planted"),
    ("POST", "/ajax-api/2.0/mlflow/upload-artifact?run_uuid=0&path=planted", b"planted"),
    ("GET", "/get-artifact?run_uuid=0&path=run.json", None),
    ("GET", "/static-files/favicon.ico", None),
    ("POST", "/graphql", b'{"query": "{mlflowGetRun {run {info {runId}}}}"}'),
    *(("GET", path, None) for path in SPELLINGS),
)


def statuses(host: str, port: int, requests: Sequence[Request]) -> list[int]:
    """Send requests without a login; return the status of each answer."""
    found = []
    for method, path, body in requests:
        connection = http.client.HTTPConnection(host, port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        found.append(connection.getresponse().status)
        connection.close()
    return found


@pytest.fixture(scope="module")
def stranger() -> Iterator[ProcessPoolExecutor]:
    """A process of another user."""
    if os.geteuid() != 0:
        missing("only root can run a process as another user")
    uid = 65534  # the user of no file
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=fork, initializer=os.setuid, initargs=(uid,)) as pool:
        assert pool.submit(os.geteuid).result() == uid
        yield pool


@pytest.fixture(scope="module")
def opened(
    served_study: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server without a login."""
    root = tmp_path_factory.mktemp("open-root")
    (root / "mlflow.db").write_bytes(empty_store.read_bytes())
    yield from served(Served(root, served_study, "--open"))


def test_another_user_of_the_machine_gets_nothing_without_the_login(
    guarded: Served, stranger: ProcessPoolExecutor
) -> None:
    home = Path(guarded.environment["HOME"])
    for host in addresses():
        found = stranger.submit(statuses, host, guarded.port, NEEDS_THE_LOGIN).result()
        assert dict.fromkeys(NEEDS_THE_LOGIN, 401) == dict(zip(NEEDS_THE_LOGIN, found, strict=True))
        assert stranger.submit(statuses, host, guarded.port, [("GET", "/health", None)]).result() == [200]
    assert len(NEEDS_THE_LOGIN) > 60
    assert not (home / ".mlflow").exists()  # where the assistant keeps its provider
    assert not [*(guarded.root / "mlflow-artifacts").rglob("planted")]


def test_another_user_of_the_machine_gets_nothing_from_a_server_on_the_loopback(
    sqlite_server: Served, stranger: ProcessPoolExecutor
) -> None:
    found = stranger.submit(statuses, "127.0.0.1", sqlite_server.port, NEEDS_THE_LOGIN).result()
    assert set(found) == {401}


def test_what_is_not_tracking_artefacts_or_page_does_not_exist_with_the_login_either(guarded: Served) -> None:
    def status(request: Request) -> int:
        method, path, body = request
        return guarded.request(method, path, body, login=guarded.login)[0]

    absent = (*ABSENT, *(("GET", path, None) for path in SPELLINGS))
    assert dict.fromkeys(absent, 404) == {request: status(request) for request in absent}
    assert dict.fromkeys(PRESENT, 200) == {request: status(request) for request in PRESENT}
    assert not (Path(guarded.environment["HOME"]) / ".mlflow").exists()


def test_the_login_must_be_whole_and_exact(guarded: Served) -> None:
    user, password = guarded.login
    right = base64.b64encode(f"{user}:{password}".encode()).decode()
    path = "/api/2.0/mlflow/experiments/search?max_results=1"

    def ask(header: str) -> int:
        return guarded.request("GET", path, headers={"Authorization": header})[0]

    assert (ask(f"Basic {right}"), ask(f"basic {right}")) == (200, 200)
    wrong = (
        f"{user}:{password[:-1]}",
        f"{user}:{password}x",
        f":{password}",
        f"{user}:",
        "",
        f"{user}{password}",
    )
    refused = ["", "Basic", "Basic !", f"Bearer {right}", right, f"Basic {right[:-4]}", "Basic \xff"]
    refused += [f"Basic {base64.b64encode(pair.encode()).decode()}" for pair in wrong]
    assert {header: ask(header) for header in refused} == dict.fromkeys(refused, 401)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://127.0.0.1:PORT"}, 200),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, 200),  # through a tunnel
        ({"Origin": "https://proxy.example.org", "Host": "proxy.example.org"}, 200),
        ({"Origin": "https://proxy.example.org"}, 200),  # a proxy that names the server to itself
        ({"Origin": "http://127.0.0.1:PORT", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://localhost:9999"}, 403),  # the port of another user of the machine
        ({"Origin": "https://evil.example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://evil.example.org", "Host": "evil.example.org"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this machine
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_a_browser_with_the_login_serves_no_other_site(
    guarded: Served, headers: dict[str, str], status: int
) -> None:
    sent = {name: value.replace("PORT", str(guarded.port)) for name, value in headers.items()}
    for method, path, body in PRESENT[3:6]:
        assert guarded.request(method, path, body, login=guarded.login, headers=sent)[0] == status
    if status == 403 and "Origin" not in headers:
        linked = {**sent, "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate"}
        assert guarded.request("GET", "/", login=guarded.login, headers=linked)[0] == 200


def spellings_of(folder: Path) -> list[bytes]:
    """Return requests for an experiment with its artefacts in a folder, however MLflow lets it be said."""
    places = [str(folder), folder.as_uri(), f"file:{folder}", f"file://localhost{folder}", f" {folder}"]
    places += [
        "mlflow-artifacts:/../../etc",
        "mlflow-artifacts://other.example.org/x",
        "http://127.0.0.1:9/x",
    ]
    places += [
        "mlflow-artifacts:/%2e%2e/%2e%2e/etc",
        "mlflow-artifacts:/a?b=/../..",
        "s3://bucket/x",
        "../owner",
    ]
    keys = ("artifact_location", "artifactLocation", "artifact_Location")
    documents = [{"name": "taken", key: place} for key in keys for place in places]
    documents.append({"name": "taken", "artifact_location": [str(folder)]})
    bodies = [json.dumps(document).encode() for document in documents]
    twice = json.dumps(bodies[0].decode()).encode()  # as old clients encoded it
    other = bodies[0].decode().encode("utf-16")
    repeated = b'{"name": "taken", "artifact_location": "", "artifact_location": "%s"}' % bytes(folder)
    return [
        *bodies,
        twice,
        other,
        repeated,
        b"[" + bodies[0] + b"]",
        b"",
        b"not JSON",
        bodies[0] + b" " * 2**21,
    ]


def test_no_experiment_keeps_its_artefacts_outside_of_the_served_folder(
    guarded: Served, tmp_path: Path
) -> None:
    owner = tmp_path / "owner"
    owner.mkdir()
    api = "/api/2.0/mlflow"
    for path in (f"{api}/experiments/create", f"/ajax-{api[1:]}/experiments/create"):
        for body in spellings_of(owner):
            status, text = guarded.request("POST", path, body, login=guarded.login)
            assert status == 400, body
            said = json.loads(text)["message"]
            if b'"artifact_location": "/' in body and len(body) < 2**20 and body[:1] == b"{":
                assert str(guarded.root / "mlflow-artifacts") in said
    named = f"{api}/experiments/get-by-name?experiment_name=taken"
    assert guarded.request("GET", named, login=guarded.login)[0] == 404
    assert not [*owner.iterdir()]


@pytest.mark.parametrize(
    "place", ["mlflow-artifacts:/own/place", "FOLDER/own/place", "file:FOLDER/own/place", ""]
)
def test_an_experiment_may_choose_a_place_in_the_served_folder(guarded: Served, place: str) -> None:
    folder, api, login = guarded.root / "mlflow-artifacts", "/api/2.0/mlflow", guarded.login
    place = place.replace("file:FOLDER", folder.as_uri()).replace("FOLDER", str(folder))
    body = json.dumps({"name": f"at {place}", "artifact_location": place}).encode()
    status, text = guarded.request("POST", f"{api}/experiments/create", body, login=login)
    assert status == 200
    made = json.dumps({"experiment_id": json.loads(text)["experiment_id"], "start_time": 1}).encode()
    run = json.loads(guarded.request("POST", f"{api}/runs/create", made, login=login)[1])["run"]["info"]
    asked = f"run_uuid={run['run_id']}&path=note.txt"
    uploaded = guarded.request("POST", f"/ajax-{api[1:]}/upload-artifact?{asked}", b"planted", login=login)
    assert uploaded[0] == 200
    assert [*folder.rglob(f"{run['run_id']}/artifacts/note.txt")]


def test_a_run_with_files_elsewhere_of_an_earlier_server_opens_no_folder(
    guarded: Served, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    inside = guarded.root / "mlflow-artifacts"
    store = MlflowClient(tracking_uri=f"sqlite:///{guarded.root}/mlflow.db")
    runs = {}
    for place in (tmp_path.as_uri(), str(tmp_path), f"{inside}/../..", inside.as_uri()):
        experiment = store.create_experiment(f"planted {place}", artifact_location=place)
        info = store.create_run(experiment).info
        at = Path(urlsplit(info.artifact_uri).path)
        at.mkdir(parents=True)
        (at / "secret").write_text("secret", encoding="utf-8")
        runs[place] = info.run_id
    good = runs.pop(inside.as_uri())

    def ask(method: str, path: str, run: str) -> int:
        body = b"planted" if method == "POST" else None
        return guarded.request(method, f"{path}?path=secret&{run}", body, login=guarded.login)[0]

    asked = (("GET", "/get-artifact"), ("GET", "/api/2.0/mlflow/artifacts/list"))
    asked += (("POST", "/ajax-api/2.0/mlflow/upload-artifact"),)
    for method, path in asked:
        assert ask(method, path, f"run_uuid={good}&run_id={good}") == 200
        for run in runs.values():
            for named in (f"run_id={run}&run_uuid={run}", f"run_id={good}&run_uuid={run}"):
                assert ask(method, path, named) == 403
    body = json.dumps({"run_id": next(iter(runs.values()))}).encode()
    assert guarded.request("GET", asked[1][1], body, login=guarded.login)[0] == 400
    assert {path.read_text(encoding="utf-8") for path in tmp_path.rglob("secret")} == {"secret"}


def test_a_server_without_a_login_says_so_loudly_and_has_no_more_parts(opened: Served) -> None:
    assert opened.told["environment"] == {"MLFLOW_TRACKING_URI": opened.address}
    assert opened.told["password_file"] is None
    assert not (opened.root / "serve").exists()

    def status(request: Request) -> int:
        return opened.request(*request)[0]

    assert {status(request) for request in PRESENT} == {200}
    assert {status(request) for request in ABSENT} == {404}
    outside = b'{"name": "taken", "artifact_location": "/root"}'
    assert status(("POST", "/api/2.0/mlflow/experiments/create", outside)) == 400
    assert opened.ask(host="attacker.example.org") == 403
    _, said = opened.stop()
    assert "--open: NO LOGIN" in said


def test_the_page_shows_a_run_its_charts_and_its_artefacts_in_a_browser(
    guarded: Served, chromium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    for name, value in guarded.clients_environment.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{guarded.port}")
    experiment = client.create_experiment("browsed")
    run = client.create_run(experiment, run_name="a-series").info.run_id
    client.log_batch(run, metrics=[Metric("train_loss", 9 / (1 + step), 1, step) for step in range(99)])
    client.log_text(run, '{"d_model": 16}', "run.json")
    base = f"http://127.0.0.1:{guarded.port}/#/experiments/{experiment}/runs"
    with Browser(chromium, tmp_path, guarded.login) as page:
        page.open(f"{base}/{run}")
        page.wait_for("a-series", "train_loss", run)
        page.open(f"{base}/{run}/model-metrics")
        page.wait_until("document.querySelectorAll('.js-plotly-plot path.js-line').length > 0")
        page.open(f"{base}/{run}/artifacts/run.json")
        page.wait_for("run.json", '"d_model"')
        page.open(base)
        page.wait_for("browsed", "a-series", "1 matching run")
    refused = {urlsplit(url).path for url, status in page.answers if status not in {200, 304}}
    offered = {"/ajax-api/2.0/mlflow/users/current", "/ajax-api/2.0/mlflow/gateway-proxy"}
    assert {path for path in refused if not path.startswith(ASSISTANT)} <= offered
    assert page.exceptions == []
    assert quote(run) in str(page.answers)
