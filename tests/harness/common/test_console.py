"""Output that cannot steer the terminal, and signals that end a block in order."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from harness.cli.terminal import Table
from harness.common import console as terminals
from harness.common.console import stoppable
from harness.submit.logs import Log, print_logs
from tests.conftest import Write
from tests.studies import Fields


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_loses_ends_the_block_at_the_next_poll(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)

    class Collected:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with stoppable() as poll_stop:
        poll_stop()
        Collected()
        assert len(lost) == 1  # nothing was raised here
        with pytest.raises(KeyboardInterrupt):
            poll_stop()
    assert signal.getsignal(number) is before


HOSTILE = {
    "colour": "\x1b[31m",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J",
    "c1": "\x9b2J",
    "return": "\r",
    "back": "\x08",
    "bidi": "\u202e",
    "isolate": "\u2067",
    "line": "\u2028",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_names_of_others_cannot_steer_the_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"ab{text}cd"
    table = Table(name, (name,))
    table.add_row((name, "green"))
    table.print(terminals.console)
    terminals.print_line(name)
    terminals.warn(name)
    said = capsys.readouterr()
    shown = said.out + said.err
    assert shown.count("cd") == 5
    assert (
        not set(text)
        & set(shown)
        & set(map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2067, 0x2028]))
    )


def test_logs_keep_their_colours_and_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("\x1b[31mred\x1b[0m \x1b]0;owned\x07\x1b[2J plain\u202e\n", encoding="utf-8")
    out = io.StringIO()
    shown = Console(file=out, force_terminal=True, markup=False, highlight=False, width=200)
    shown.push_render_hook(terminals.Harmless())
    print_logs(shown, [Log("worker", log)])
    assert "\x1b[31mred\x1b[0m" in out.getvalue()
    for steering in ("\x07", "\x1b]", "\x1b[2J", "\u202e"):
        assert steering not in out.getvalue()


NEVER_READ = ("| true", "> /dev/full", ">&-", "2>&1 | head -c 10")


@pytest.mark.parametrize("output", NEVER_READ)
def test_training_goes_on_though_its_output_cannot_be_written(
    tmp_path: Path, study_fields: Fields, write_study: Write, output: str
) -> None:
    words = [sys.executable, "-m", "harness", "submit", str(write_study(study_fields)), "--on", "local"]
    line = f"{shlex.join([*words, '--root', str(tmp_path / 'runs')])} {output}"
    said = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in said.stderr
    assert len(list((tmp_path / "runs").glob("runs/*/checkpoints/model.safetensors"))) == 2


@pytest.mark.parametrize("output", NEVER_READ)
def test_no_verb_prints_a_traceback_for_its_output(output: str) -> None:
    line = f"{shlex.join([sys.executable, '-m', 'harness', '--help'])} {output}"
    said = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in said.stderr
    assert "Exception ignored" not in said.stderr
    assert ("No space left" in said.stderr) == ("full" in output)
