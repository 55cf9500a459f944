"""The list of what `ssmscale serve` has, the check of it at the start, and the files of the login."""

from __future__ import annotations

import os
import stat
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from harness.record.root import Root
from harness.tracking.app import ALLOWED, is_allowed, is_inside, reads_only
from harness.tracking.auth import Credentials
from harness.tracking.server import Server, check_refusals
from ssmttm.errors import InputError
from tests.cluster.misbehaving import Misbehaving
from tests.cluster.servers import free_port

ASSISTANT = "/ajax-api/3.0/mlflow/assistant"


def test_every_entry_of_the_list_is_a_part_of_this_mlflow() -> None:
    from mlflow.server import app

    rules = {
        (method, rule.rule.replace("<path:artifact_path>", "a/b").replace("<path:path>", "a.js"))
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
    }
    listed = sorted(path for method, path in rules if is_allowed(method, path))
    assert not [path for path in listed if "gateway" in path or "assistant" in path or "job" in path]
    names = {path.split("/mlflow/")[-1] for path in listed}
    for pattern in ALLOWED.values():
        for name in pattern.pattern.replace("\\", "").split("(?:")[-1].rstrip(")").split("|"):
            if name.startswith(("runs/", "experiments/")):
                assert name in names
    assert len(listed) < len(rules) / 4


def test_graphql_reads_a_run_or_an_experiment_and_nothing_else() -> None:
    allowed = [
        "{mlflowGetRun(input: {runId: 1}) {run {info {runId}}}}",
        "query A {mlflowGetExperiment {experiment {name}}} query B {x: mlflowGetRun {run {...I}}} "
        "fragment I on MlflowRun {info {runId}}",
    ]
    refused = [
        "{mlflowSearchModelVersions {modelVersions {name}}}",
        "{mlflowGetRun: mlflowListArtifacts {files {path}}}",
        "{mlflowGetRun {run {info {runId}}} __schema {types {name}}}",
        "mutation {mlflowGetRun {run {info {runId}}}}",
        "query A {...Q} fragment Q on Query {mlflowListArtifacts {files {path}}}",
        "{... on Query {mlflowListArtifacts {files {path}}}}",
        "fragment Q on Query {mlflowGetRun {run {info {runId}}}}",
        "type Query {x: Int}",
        "no GraphQL",
        "",
    ]
    assert [reads_only({"query": text}) for text in allowed] == [True] * len(allowed)
    assert [reads_only({"query": text}) for text in refused] == [False] * len(refused)
    assert not any(map(reads_only, [None, [{"query": allowed[0]}], {}, {"query": 3}]))


def test_a_place_is_inside_in_plain_spelling_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a b%20c"
    inside = [
        str(folder),
        f"{folder}/x",
        folder.as_uri(),
        f"{folder.as_uri()}/x/y/",
        "mlflow-artifacts:/",
        "mlflow-artifacts:/1",
    ]
    outside = [
        f"{folder}2",
        f"{folder}/..",
        f"{folder}/../",
        f"{folder}/x/../../y",
        f"{folder}//x",
        f"{folder}/./x",
    ]
    outside += [
        f"{folder}/%2e%2e",
        f"{folder}/x\n",
        f"{folder}/\\x",
        str(tmp_path),
        "/",
        ".",
        "mlflow-artifacts://x",
    ]
    outside += ["MLFLOW-ARTIFACTS:/x", "mlflow-artifacts:x", f"{folder.as_uri()}#/..", f"file://host{folder}"]
    assert {place: is_inside(place, folder) for place in inside} == dict.fromkeys(inside, True)
    assert {place: is_inside(place, folder) for place in outside} == dict.fromkeys(outside, False)


class Handler(BaseHTTPRequestHandler):
    """Guards like the app, but for the requests in `lets_in`, `has` and `writes`."""

    lets_in: str = ""
    has: str = ""
    writes: bool = False

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "Authorization" not in self.headers and self.path != self.lets_in:
            status, text = 401, b""
        elif self.path.endswith("experiments/create"):
            status, text = (
                (200, b"{}") if self.writes else (400, b"artifact_location: experiments keep their")
            )
        else:
            status, text = (200 if self.path == self.has else 404), b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"lets_in": "/"}, "answers GET / without a login (404)"),
        ({"lets_in": f"{ASSISTANT}/message"}, f"answers POST {ASSISTANT}/message without a login"),
        ({"has": f"{ASSISTANT}/config"}, f"has GET {ASSISTANT}/config, which it must not have"),
        ({"has": "/v1/traces"}, "has POST /v1/traces"),
        ({"writes": True}, "keeps artefacts in any folder"),
    ],
)
def test_a_server_that_answers_what_it_must_refuse_is_stopped(
    wrong: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    port = free_port()
    server = Server(
        Root(tmp_path), "sqlite:///x", "127.0.0.1", port, (), tmp_path / "log", Credentials(tmp_path)
    )
    with Misbehaving(port, type("Wrong", (Handler,), wrong)), pytest.raises(InputError) as refused:
        check_refusals(server)
    assert sentence in str(refused.value)


def test_the_password_of_before_stays_and_its_files_become_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "serve"
    folder.mkdir(mode=0o777)
    (folder / "password").write_text("a-password-of-before\n", encoding="utf-8")
    (folder / "auth.db").write_bytes(b"of MLflow's own login")
    login = Credentials(folder)
    assert login.password == "a-password-of-before"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "password")]
    assert modes == [0o700, 0o600]


def test_a_login_that_another_could_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short"
    short.mkdir()
    (short / "password").write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"{short}/password: the password has fewer than 12 characters"):
        Credentials(short)
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path)
    with pytest.raises(InputError, match=f"{linked}: the login needs a file or folder here, not a link"):
        Credentials(linked)
    (short / "password").unlink()
    (short / "password").symlink_to(tmp_path / "of-another")
    with pytest.raises(InputError, match="not a link"):
        Credentials(short)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match="belongs to another user"):
        Credentials(tmp_path)
