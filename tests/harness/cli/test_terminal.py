"""Tables and progress in real terminals of several widths, with and without colour, and in a pipe."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from harness.cli.terminal import Table
from harness.record.journal import Event
from harness.record.root import Root
from tests.conftest import REPOSITORY, Command, Write
from tests.harness.journals import begin_run, begin_series, finish, log_steps, registered
from tests.studies import Fields

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def in_terminal(columns: int, *arguments: object, **environment: str) -> str:
    """Call the command in a terminal and return all that it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(REPOSITORY), **environment},
    )
    os.close(theirs)
    written = b""
    with suppress(OSError):  # Linux raises EIO when the last process has closed a terminal
        while more := os.read(ours, 65536):
            written += more
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode().replace("\r\n", "\n")


def lines_of(written: str) -> list[str]:
    return ESCAPES.sub("", written).splitlines()


@pytest.mark.parametrize("columns", [80, 200])
def test_the_plan_of_the_paper_fits_into_a_terminal_and_ends_with_its_totals(
    columns: int, tmp_path: Path
) -> None:
    sweep = REPOSITORY / "sweeps" / "scaling_down.yaml"
    lines = lines_of(in_terminal(columns, "plan", sweep, "--root", tmp_path))
    assert len(lines) <= 40
    assert max(map(len, lines)) <= columns
    assert sum(" 5k-100k (8) " in line for line in lines) == 2 * 4
    assert any(re.match(r"full +prefix_simba +5k-100k \(8\) +8 new +\d+ ", line) for line in lines)
    names = ("to spend", "trunks save", "longest path", "disk")
    assert [line.split("  ")[0] for line in lines[-5:] if not line.startswith(" ")] == list(names)


@pytest.fixture
def troubled(tmp_path: Path, study_fields: Fields) -> Root:
    """Forty runs of two sizes: one done, twelve failed for a long reason, one interrupted, the rest new."""
    root = Root(tmp_path / "runs")
    study_fields["grid"]["sizes"]["l"] = {"n_blocks": 1, "d_model": 32}
    study_fields["grid"] |= {"iterations": [10], "seeds": list(range(20))}
    first, second, *others = (point.run for point in registered(root, study_fields).points)
    finish(begin_run(root, first), first, loss=2.5)
    for run in others[:12]:
        with begin_run(root, run) as journal:
            journal.append(Event.FAILED, reason="the loss is not finite; " * 2)
    with begin_series(root, second, host="elsewhere", boot_id="of another machine") as trunk:
        log_steps(trunk, [3])
        trunk.append(Event.PREEMPTED)
    return root


def test_the_status_of_a_study_counts_runs_and_names_those_that_need_the_user(troubled: Root) -> None:
    lines = lines_of(in_terminal(80, "status", "tiny", "--root", troubled.path))
    assert len(lines) <= 45
    rest = lines[: next(number for number, line in enumerate(lines) if line.startswith("`ssmscale "))]
    assert max(map(len, rest)) <= 80
    text = " ".join(" ".join(lines).split())
    assert lines[2].startswith("xs ")
    assert "2.5000" in lines[2]
    assert "20 new" in text
    shown = [line for line in lines if re.match(r"[0-9a-f]{12} ", line)]
    assert len(shown) == 10
    assert all(" failed " in line for line in shown)
    assert "and 3 more: 2 failed, 1 interrupted" in text
    place = shlex.quote(str(troubled.path))
    joined = "".join(lines)  # the terminal breaks the lines of commands
    assert f"`ssmscale retry tiny --root {place}` trains failed runs again" in joined
    assert f"`ssmscale submit tiny --root {place}` goes on with interrupted runs" in joined
    assert re.search(r"1 done, 1 interrupted, 12 failed, 26 new GPU-hours: ", text)


def test_every_run_has_a_row_on_request(
    troubled: Root, ssmscale: Command, write_study: Write, study_fields: Fields
) -> None:
    shown = ssmscale("status", "tiny", "--runs").out.splitlines()
    assert sum(re.match(r"[0-9a-f]{12} ", line) is not None for line in shown) == 40
    planned = ssmscale("plan", write_study(study_fields), "--runs").out.splitlines()
    assert sum(re.match(r"[0-9a-f]{12} ", line) is not None for line in planned) == 40


@pytest.mark.parametrize(
    ("environment", "escape"),
    [({}, r"\x1b\[31m"), ({"NO_COLOR": "1"}, r"\x1b\[[13]m"), ({"TERM": "dumb"}, None)],
    ids=["colour", "no colour", "dumb"],
)
def test_a_terminal_gets_the_escapes_that_it_understands(
    environment: dict[str, str], escape: str | None, troubled: Root
) -> None:
    written = in_terminal(80, "status", "tiny", "--root", troubled.path, "--watch", **environment)
    assert lines_of(written)[-1].startswith("GPU-hours: ")
    assert ("\x1b" in written) == (escape is not None)
    if escape is not None:
        assert re.search(escape, written)
    if "NO_COLOR" in environment:
        assert "\x1b[31m" not in written


def test_a_pipe_gets_each_row_on_one_line_without_escapes(troubled: Root, ssmscale: Command) -> None:
    out = ssmscale("status", "tiny").out
    assert "\x1b" not in out
    failed = [line for line in out.splitlines() if re.match(r"[0-9a-f]{12} ", line)]
    assert len(failed) == 10
    assert all(line.rstrip().endswith("the loss is not finite;") for line in failed)


def table_in(width: int) -> list[str]:
    table = Table("title", ("name", "number", "reason"), ("number",))
    table.add_row("a" * 20, "123,456", "a reason of several words that go on")
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    table.print(console)
    assert isinstance(console.file, io.StringIO)
    return lines_of(console.file.getvalue())


def test_a_narrow_terminal_folds_texts_and_cuts_nothing() -> None:
    assert len(table_in(80)) == 3
    folded = table_in(40)
    assert max(map(len, folded)) <= 40
    assert "123,456" in " ".join(folded)
    texts = "".join(folded).replace(" ", "")
    assert sorted(texts) == sorted("".join(table_in(80)).replace(" ", ""))


def test_long_work_shows_progress_in_a_terminal_and_none_in_a_pipe(
    troubled: Root, ssmscale: Command, tmp_path: Path
) -> None:
    shown = in_terminal(80, "export", "tiny", "--root", troubled.path, "--out", tmp_path / "shown.zip")
    assert "reading finished runs" in shown
    piped = ssmscale("export", "tiny", "--out", "piped.zip")
    assert (piped.status, piped.err) == (0, "")
    assert "reading finished runs" not in piped.out


def test_a_terminal_without_a_letter_gets_it_escaped_and_no_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C"}
    command = [sys.executable, "-m", "harness", "status", "größe", "--root", str(tmp_path / "wurzel-ü")]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.decode("ascii").startswith(r"error: gr\xf6\xdfe: there is no such file")
    program = "import sys; sys.argv[1:] = ['--version']; from harness.common.console import console; "
    program += "from harness.cli.app import main\ntry: main()\nexcept SystemExit: console.print('größe')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert done.stdout.decode("ascii").splitlines()[-1] == r"gr\xf6\xdfe"
