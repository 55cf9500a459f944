"""A signal ends a block in order, even if Python loses the exception of its handler."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from harness.common.console import stoppable


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
