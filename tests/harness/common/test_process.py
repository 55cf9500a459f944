"""Lines that processes send to each other through pipes, and logs that they append to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.common.process import PipeReader, sent_to, start_logged
from harness.record.control import Control
from ssmttm.errors import InputError


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


@pytest.mark.parametrize("linked", ["logs", "logs/rank-0.log"])
def test_nothing_is_appended_through_a_link(tmp_path: Path, linked: str) -> None:
    folder, elsewhere = tmp_path / "logs", tmp_path / "mine"
    elsewhere.mkdir()
    mine = elsewhere / "rank-0.log"
    mine.write_text("kept")
    if linked == "logs":
        if os.geteuid():
            pytest.skip("only root can make another user's link")
        folder.symlink_to(elsewhere)
        os.chown(folder, 65534, 65534, follow_symlinks=False)
    else:
        folder.mkdir()
        (folder / "rank-0.log").symlink_to(mine)
    log = folder / "rank-0.log"
    with pytest.raises(InputError, match=f"{linked}: is .* link, through which"), sent_to(log):
        pass
    with pytest.raises(InputError, match="link, through which"):
        start_logged(["true"], log)
    with pytest.raises(InputError, match="link, through which"):
        Control(log).append("cancelled", runs=[])
    assert mine.read_text() == "kept"
