"""What processes say to each other through pipes."""

from __future__ import annotations

import os

from harness.common.process import PipeReader


def test_a_line_is_read_once_it_is_whole_and_the_end_after_the_last() -> None:
    ours, theirs = os.pipe()
    try:
        told = PipeReader(ours)
        assert told.read() == []
        os.write(theirs, b"first\nsec")
        assert told.read(60.0) == [b"first"]
        os.write(theirs, b"ond\nthird\ntorn")
        assert told.read(60.0) == [b"second", b"third"]
        assert not told.is_ended
        os.close(theirs)
        assert told.read(60.0) == []
        assert told.is_ended
    finally:
        os.close(ours)
