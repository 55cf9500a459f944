"""Output that cannot steer the terminal, and signals that end a block in order."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from harness.cli.terminal import Table
from harness.common import console as terminals
from harness.common.console import stoppable
from harness.submit.logs import Log, print_logs


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
