"""DiskFull names the path, whichever library found the disk full."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from harness.common.disk import (
    SLACK,
    DiskFull,
    append_line,
    appending,
    free_bytes,
    is_full,
    make_folder,
    space_for,
    write_atomically,
)
from harness.dispatch.ray.cluster import make_token
from ssmttm.errors import InputError
from tests.conftest import fill

STRANGER = 65534
"""A user without files."""
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}


@pytest.fixture
def disk(small_disk: Callable[[int], Path]) -> Path:
    return small_disk(256 * 1024)


def test_a_file_that_does_not_fit_is_refused_first_and_bytes_of_other_ranks_count(disk: Path) -> None:
    with pytest.raises(DiskFull, match=r"0\.5 MiB"), space_for(2**19, disk / "sub" / "x"):
        (disk / "x").write_bytes(b"never")
    assert not (disk / "x").exists()
    (disk / "tag").mkdir()
    (disk / "tag" / "of another rank").write_bytes(bytes(150_000))
    assert free_bytes(disk) < 200_000
    with space_for(200_000, disk / "tag"):
        (disk / "tag" / "of this rank").write_bytes(bytes(50_000))


@pytest.mark.parametrize("library", ["torch, zipped", "torch, not zipped", "safetensors"])
def test_a_library_that_fails_on_a_full_disk_raises_disk_full(disk: Path, library: str) -> None:
    import torch
    from safetensors.torch import save_file

    zipped = partial(torch.save, _use_new_zipfile_serialization=library == "torch, zipped")
    save = save_file if library == "safetensors" else zipped
    with pytest.raises(DiskFull, match=r"x\.pt"), space_for(100_000, disk / "x.pt"):
        save({"a": torch.zeros(100_000)}, disk / "x.pt")


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), space_for(1, tmp_path / "x"):
        _ = 1 / 0
    assert not is_full(OSError(errno.EIO, "input/output error"))
    assert is_full(OSError(errno.EDQUOT, "quota"))


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(disk: Path) -> None:
    path = disk / "lines"
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR)
    append_line(descriptor, b"one\n", path, durable=True)
    with pytest.raises(DiskFull, match="lines"):
        append_line(descriptor, b"x" * 2**20 + b"\n", path, durable=True)
    assert path.read_bytes() == b"one\n"
    append_line(descriptor, b"two\n", path, durable=False)
    assert path.read_bytes() == b"one\ntwo\n"
    os.close(descriptor)
    assert free_bytes(disk / "not" / "there") > 0


def test_rays_token_that_does_not_fit_is_a_full_disk(disk: Path) -> None:
    fill(disk)
    with pytest.raises(DiskFull, match="token-"):
        make_token(disk)


def test_a_short_write_is_a_full_disk_even_if_space_has_been_freed_since(
    small_disk: Callable[[int], Path],
) -> None:
    import torch

    disk = small_disk(4 * SLACK)
    (disk / "filling").write_bytes(bytes(4 * SLACK - 2**14))

    def save_and_free_space() -> None:
        with space_for(1, disk / "weights"):
            try:
                torch.save(torch.zeros(10_000), disk / "weights")
            finally:
                (disk / "filling").unlink()

    with pytest.raises(DiskFull, match="weights"):
        save_and_free_space()
    assert free_bytes(disk) > 2 * SLACK


def test_output_to_a_full_disk_is_dropped_and_the_exit_status_stays(disk: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from harness.common.process import flush_or_drop, print_traceback, sent_to\n"
        "with sent_to(Path(sys.argv[1])):\n"
        "    print('lost')\n"
        "    try: 1 / 0\n"
        "    except ZeroDivisionError: print_traceback()\n"
        "print('heard')\n"
        "flush_or_drop()\n"
        "sys.exit(74)\n"
    )
    fill(disk)
    command = [sys.executable, "-c", program, str(disk / "log")]
    done = subprocess.run(command, env=BUFFERED, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (74, "heard\n"), done.stderr


def test_a_process_that_cannot_write_its_output_ends_with_its_own_status(disk: Path) -> None:
    program = "print('lost'); {}raise SystemExit(74)"
    fill(disk)
    endings = []
    for flushed in ("", "from harness.common.process import flush_or_drop; flush_or_drop(); "):
        with (disk / "log").open("wb") as log:
            command = [sys.executable, "-c", program.format(flushed)]
            done = subprocess.run(command, env=BUFFERED, stdout=log, stderr=log, check=False)
            endings.append(done.returncode)
    assert endings == [120, 74]  # Python's own status, and that of the program


def test_a_file_system_that_is_read_only_is_named_as_such(disk: Path) -> None:
    (disk / "old").write_text("kept")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(DiskFull, match=r"new: its file system is read-only") as told:
        write_atomically(disk / "new", "{}")
    assert told.value.remedy == "make it writable"
    with pytest.raises(DiskFull, match="is read-only"), space_for(10, disk / "folder"):
        pass
    assert (disk / "old").read_text() == "kept"


def append(path: Path, text: str) -> None:
    make_folder(path.parent)
    with appending(path) as descriptor:
        os.write(descriptor, text.encode())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")
@pytest.mark.parametrize("write", [write_atomically, lambda path, text: make_folder(path / text), append])
def test_nothing_is_written_through_another_users_link(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.mkdir()
    link.symlink_to(mine)
    os.chown(link, STRANGER, -1, follow_symlinks=False)
    with pytest.raises(InputError, match=f"{link}: is another user's link"):
        write(link / "deep" / "file", "text")
    assert not any(mine.iterdir())
    os.chown(mine, STRANGER, -1)  # who could have had a folder of that name there
    write(link / "deep" / "file", "text")
    assert any(mine.iterdir())
