"""What tests share: a tiny corpus written once, studies on it, and the command called in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, settings

from harness.record.root import Root
from harness.tracking.store import connect, default_uri
from tests.corpora import write_tiny_corpus
from tests.studies import Fields, tiny_study

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault(
    "MLFLOW_HTTP_REQUEST_TIMEOUT", "300"
)  # a server on a busy machine is slow, and not gone

# A shell without job control starts what it puts in the background with Ctrl-C ignored, and so would be all processes
# that tests start and then interrupt.
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same cases every time, however slow the machine.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

REPOSITORY = Path(__file__).parent.parent

Write = Callable[..., Path]
"""The fixture `write_study`: a study's fields and perhaps the name of its file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait for servers first, each before one that computes, and the quickest last.

    So two workers seldom wait at the same time, and neither is left with a long file when the other is done.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    room = {path: path.relative_to(Path(__file__).parent).parts[0] for path in files}
    waiting = [path for path in files if room[path] == "cluster"]
    computing = [path for path in files if room[path] == "harness"]
    both = [path for pair in zip_longest(waiting, computing) for path in pair if path is not None]
    others = [path for path in files if path not in both]
    items[:] = [item for path in (*both, *others) for item in files[path]]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 48 made clips of 50 frames, two codebooks of 64 entries; read it, never change it."""
    path = tmp_path_factory.mktemp("corpus") / "tiny"
    write_tiny_corpus(path)
    return path


@pytest.fixture
def study_fields(tiny_corpus: Path) -> Fields:
    """A study of one small model on the tiny corpus, as the mapping its YAML holds; change it at will."""
    return tiny_study(tiny_corpus)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store with its tables made, which takes seconds; to be copied."""
    root = Root(tmp_path_factory.mktemp("store"))
    connect(default_uri(root))
    return root.path / "mlflow.db"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount real, small disks: call it with their bytes; skips where this machine lets nobody mount."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def write_study(tmp_path: Path) -> Write:
    """Write a study's mapping as YAML and return its path."""

    def write(fields: Fields, name: str = "study.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        return path

    return write


@dataclass(frozen=True)
class Answer:
    """The exit status of the command and what it printed."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON document that the command printed when it ended well."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    def assert_refused(self, *words: str) -> None:
        """The input was refused: status 2, no traceback, and a message with these words."""
        assert self.status == 2, (self.out, self.err)
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err, (word, self.err)


Command = Callable[..., Answer]
"""The fixture `ssmscale`: the words of a command line."""


@pytest.fixture
def ssmscale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Call the command in this process, in a directory of the test's own."""
    from harness.cli.app import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSMSCALE_ROOT", raising=False)

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["ssmscale", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        assert isinstance(code, int)
        return Answer(code, said.out, said.err)

    return call


def flip_a_byte(path: Path) -> None:
    """Damage a file in its middle and leave its size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def files_below(folder: Path) -> Sequence[str]:
    """Every file below a folder, to see that nothing was written."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
