"""A ROOT that a team shares: each member may use what the group may, and who may only read gets every reading verb."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from harness.record.registry import ResolvedStudy
from harness.record.root import Root
from ssmttm.locks import file_lock
from tests.conftest import Answer, Command, Write
from tests.harness.journals import begin_series, log_steps, registered, write_finished
from tests.studies import Fields, with_iterations

READER = 65534
"""A user without files."""
_CALLED: list[Command] = []


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("how", ["by the umask", "by the folder"])
def test_all_files_of_a_groups_root_can_be_read_and_written_by_the_group(
    tmp_path: Path, study_fields: Fields, write_study: Write, ssmscale: Command, how: str
) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    if how == "by the folder":
        root.chmod(0o2775)
    with umask(0o002 if how == "by the umask" else 0o022):
        assert ssmscale("submit", write_study(study_fields), "--on", "local", "--root", root).status == 0
    closed = [path for path in root.rglob("*") if not closed_by_purpose(path) and not is_open(path)]
    assert not closed


def is_open(path: Path) -> bool:
    wanted = 0o070 if path.is_dir() else 0o060
    return stat.S_IMODE(path.stat().st_mode) & wanted == wanted


def closed_by_purpose(path: Path) -> bool:
    """True for the meeting of one user's ranks."""
    return path.name.startswith(".meeting-")


@pytest.fixture
def read_only(there: Path, study_fields: Fields, ssmscale: Command) -> Iterator[Callable[..., Answer]]:
    """Call the command as a user who may read a trained ROOT and write nothing there."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        shutil.copytree(there, folder / "runs")
        points = registered(Root(folder / "runs"), many(study_fields)).points
        write_finished(Root(folder / "runs"), points)
        # The reader may not be allowed to import what this process has not imported yet.
        assert ssmscale("report", "many", "--root", folder / "runs", "--out", folder / "page").status == 0
        (folder / "own").mkdir()
        folder.chmod(0o755)
        os.chown(folder / "own", READER, READER)

        def call(*words: object) -> Answer:
            with ProcessPoolExecutor(1, get_context("fork"), become, (folder / "own", ssmscale)) as pool:
                return pool.submit(call_there, *words, "--root", folder / "runs").result()

        yield call


def many(fields: Fields) -> Fields:
    """Return a study with enough runs for a fit."""
    fields["grid"]["sizes"] = {f"s{n}": {"n_blocks": n, "d_model": 16} for n in (1, 2, 3)}
    return with_iterations(fields | {"name": "many"}, 5, 10, 20)


def become(home: Path, ssmscale: Command) -> None:
    """Make a forked process that of the reader, which calls the command."""
    _CALLED.append(ssmscale)
    os.setgroups([])
    os.setgid(READER)
    os.setuid(READER)
    os.environ |= {"HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    os.chdir(home)


def call_there(*words: object) -> Answer:
    return _CALLED[0](*words)


def test_who_may_only_read_gets_every_reading_verb(read_only: Callable[..., Answer]) -> None:
    for verb in (
        ("status", "tiny", "--runs"),
        ("points", "tiny"),
        ("fit", "many"),
        ("report", "many", "--out", "page"),
        ("export", "tiny", "--out", "tiny.zip"),
        ("prune", "tiny", "--dry-run"),
    ):
        answer = read_only(*verb)
        assert answer.status == 0, (verb, answer.err)
        assert answer.out, verb
    assert "keeps no copy of the report" in read_only("report", "many", "--out", "page").err


def test_who_may_not_write_is_told_the_file(read_only: Callable[..., Answer], there: Path) -> None:
    run = next((there / "runs").iterdir()).name
    for verb in (
        ("submit", "tiny", "--on", "local"),
        ("evaluate", "tiny"),
        ("generate", run, "--prompt", "a", "--out", "a.wav"),
    ):
        answer = read_only(*verb)
        assert answer.status in {1, 2}
        assert "ermission denied" in answer.err, (verb, answer.err)
        assert "None" not in answer.err


def test_a_run_of_another_host_runs_while_its_series_is_locked_and_is_interrupted_when_that_host_died(
    resolved: ResolvedStudy, ssmscale: Command
) -> None:
    root, run = resolved.root, resolved.points[-1].run
    log_steps(begin_series(root, run, host="elsewhere"), [1, 2])

    def states() -> list[str]:
        document = ssmscale("status", resolved.study.name, "--root", root.path, "--json").document
        return [each["state"] for each in document["runs"]]

    with file_lock(root.series(run.series_id) / "lock"):
        assert states() == ["running", "running"]
    assert states() == ["interrupted", "interrupted"]
