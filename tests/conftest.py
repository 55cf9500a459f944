"""Fixtures of all tests: a tiny corpus written once, studies on it, and the command called in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_limits

from harness.record.root import Root
from harness.tracking.store import connect, default_uri
from tests.corpora import write_tiny_corpus
from tests.reaper import start_reaper
from tests.studies import Fields, tiny_study

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")  # a busy machine answers late

# A shell without job control starts background processes with Ctrl-C ignored. Tests that start processes and
# interrupt them need it.
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same cases every time, also on a slow machine.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

REPOSITORY = Path(__file__).parent.parent

# Tests start a hundred processes. Where no bytecode is written, each compiles all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Several workers share the cores, and threads of OpenBLAS that wait for one take the time of the others: seven times as
# long for the products of a codec.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
threadpool_limits(limits=1, user_api="blas")

Write = Callable[..., Path]
"""The fixture `write_study`: it takes a study's fields, and a name for the file."""


LONGEST_FIRST = (
    "cluster/test_ray_submit.py",
    "cluster/test_tracker_faults.py",
    "cluster/test_slurm_story.py",
    "harness/cli/test_command.py",
    "cluster/test_ray_job.py",
    "cluster/test_slurm_faults.py",
    "harness/train/test_faults.py",
    "cluster/test_sidecar.py",
    "harness/dispatch/test_stalls.py",
    "harness/dispatch/test_ray_here.py",
    "cluster/test_slurm_zero.py",
    "harness/archive/test_bundle.py",
    "cluster/test_tune_slurm.py",
    "harness/tuning/test_tune.py",
    "cluster/test_slurm_code.py",
    "cluster/test_serve.py",
)
"""Files that take a minute or more; the others follow room by room."""
ROOMS = ("cluster", "harness", "ssmttm", "analysis")

SLOW_PATHS = {"cluster", "golden", "test_coverage.py", "test_former_root.py", "test_left_to_others.py"}
"""Folders and files that start servers, train, or fit for a minute."""
SLOW_MODULES = {
    "subprocess",
    "multiprocessing",
    "tests.waiting",
    "tests.checkouts",
    "analysis.report.report",
    "tests.analysis.report.test_report",
} | {f"tests.harness.{name}" for name in ("faults", "rays", "trainer", "tuner")}
SLOW_FIXTURES = {"bach_corpus", "bundle", "empty_store", "there"}


def pytest_configure(config: pytest.Config) -> None:
    """Have every process that the tests start killed when the run has ended, however it ends.

    A run of `-m gpu` uses the GPU. Every other run leaves it alone, since its tests compare with figures of the CPU.
    """
    start_reaper()
    if config.option.markexpr == "gpu":
        # One configuration of each kernel: the search for the fastest takes minutes.
        os.environ |= {"MAMBA_DETERMINISTIC": "1", "TRITON_CACHE_AUTOTUNING": "0"}
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    if Path("/proc/driver/nvidia/gpus").is_dir() or Path("/dev/dxg").exists():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no worker begins one when the others are done; mark quick tests."""

    def rank(item: pytest.Item) -> tuple[int, int]:
        name = item.path.as_posix().rpartition("/tests/")[2]
        room = name.partition("/")[0]
        return (
            LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST),
            ROOMS.index(room) if room in ROOMS else len(ROOMS),
        )

    items.sort(key=rank)
    for item in items:
        if is_quick(item):
            item.add_marker("quick")


def is_quick(item: pytest.Item) -> bool:
    """True if a test starts no server or training and writes no report, by its path, fixtures and file's imports."""
    if SLOW_PATHS & set(item.path.parts) or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
        return False
    imported = vars(getattr(item, "module", object)).values()
    return not any(
        (value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", ""))
        in SLOW_MODULES
        for value in imported
    )


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 48 made clips of 50 frames, two codebooks of 64 entries; read it, never change it."""
    path = tmp_path_factory.mktemp("corpus") / "tiny"
    write_tiny_corpus(path)
    return path


@pytest.fixture
def study_fields(tiny_corpus: Path) -> Fields:
    """A study of one small model on the tiny corpus, as the mapping of its YAML; a test may change it."""
    return tiny_study(tiny_corpus)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store to be copied; making its tables takes seconds, so all workers of a run share it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    root = Root(folder / "empty-store")
    with FileLock(folder / "empty-store.lock"):
        if not root.path.exists():
            draft = Root(folder / "empty-store-draft")
            draft.path.mkdir()
            connect(default_uri(draft))
            draft.path.rename(root.path)
    return root.path / "mlflow.db"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount real, small disks, each of so many bytes; skips where this machine lets no disk be mounted."""
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
        """Assert that the input was refused with status 2, no traceback, and these words."""
        assert self.status == 2, (self.out, self.err)
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err, (word, self.err)


Command = Callable[..., Answer]
"""The fixture `ssmscale`: it takes the words of a command line."""


@pytest.fixture
def ssmscale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Call the command in this process, in a directory of the test's own."""
    from harness.cli.app import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSMSCALE_ROOT", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # Ray sets it in a process that has joined a cluster
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # as the command does, and undone after the test

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


def poison(folder: Path) -> Path:
    """Put modules of Python's and of the harness's names into a folder that a command is called from."""
    trap = "raise SystemExit('imported from the folder where the command was called')"
    for name in ("profile", "random", "tempfile", "socket", "torch", "ray"):
        (folder / f"{name}.py").write_text(trap, encoding="utf-8")
    for name in ("harness", "ssmttm"):
        (folder / name).mkdir()
    return folder


def flip_a_byte(path: Path, place: int | None = None) -> None:
    """Damage a file at a place, by default in its middle, and leave its size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def fill(disk: Path) -> Path:
    """Fill a disk with one file and return that."""
    filling = disk / "filling"
    with filling.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filling


def files_below(folder: Path) -> Sequence[str]:
    """Return every file below a folder, to compare before and after."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="session")
def cases() -> Path:
    """Folder of small tables with known answers: SCALING_CASES_DIR, else ../shared/cases beside the repository."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("SCALING_CASES_DIR", root / ".." / "shared" / "cases")) / "analysis"
    if not path.is_dir():
        pytest.skip(f"no tables at {path}: set SCALING_CASES_DIR to the folder that holds them")
    return path
