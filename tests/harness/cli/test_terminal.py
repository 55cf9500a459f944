"""How the command is told to stop."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from harness.common.console import stoppable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_loses_is_heeded_all_the_same(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)

    class Collected:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with stoppable() as heed:
        heed()
        Collected()
        assert len(lost) == 1  # nothing was raised here
        with pytest.raises(KeyboardInterrupt):
            heed()
    assert signal.getsignal(number) is before
