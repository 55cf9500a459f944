"""Lines that processes send to each other through pipes."""

from __future__ import annotations

import os

from harness.common.process import PipeReader


def test_a_line_is_read_once_it_is_whole_and_the_end_after_the_last() -> None:
    ours, theirs = os.pipe()
    with os.fdopen(ours):
        pipe = PipeReader(ours)
        assert pipe.read() == []
        os.write(theirs, b"first\nsec")
        assert pipe.read(60.0) == [b"first"]
        os.write(theirs, b"ond\nthird\ntorn")
        assert pipe.read(60.0) == [b"second", b"third"]
        assert not pipe.is_ended
        os.close(theirs)
        assert pipe.read(60.0) == []
        assert pipe.is_ended
