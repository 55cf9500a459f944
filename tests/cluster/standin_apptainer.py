"""A stand-in for Apptainer, which this machine cannot install: it runs `apptainer exec`, and records each command line.

The image is a file of JSON: `folders` are the folders of this machine that it holds, and `path` is its PATH. As in a
container, the program sees these, the user's home, /dev, /proc, /sys and the binds, and nothing else of the disk; it
is a child that gets the signals sent to this process, whose exit status is the child's. Nothing here checks what a
real runtime would refuse, and no squashfs image is read. It needs root.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

CLONE_NEWNS = 0x00020000
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def main() -> None:
    """Run `apptainer exec FLAGS IMAGE COMMAND`."""
    words = sys.argv[1:]
    with Path(__file__).with_name("started.jsonl").open("a") as file:
        file.write(json.dumps(words) + "\n")
    assert words[0] == "exec", words
    count = next(number for number, word in enumerate(words) if number and not word.startswith("-"))
    flags, image, command = words[1:count], json.loads(Path(words[count]).read_text()), words[count + 1 :]
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    if (child := os.fork()) == 0:
        enter(flags, image)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        os.execvp(command[0], command)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    end(os.waitpid(child, 0)[1])


def enter(flags: list[str], image: dict[str, list[str]]) -> None:
    """Enter a file system of the image's folders and the binds."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("--make-rprivate", "/")
    root = str(Path(__file__).with_name("root"))
    Path(root).mkdir(exist_ok=True)
    mount("-t", "tmpfs", "none", root)
    here = "."
    folders = (*image["folders"], str(Path.home()), "/dev", "/proc", "/sys")
    binds = [(folder, folder) for folder in folders]
    for flag in flags:
        name, _, value = flag.partition("=")
        if name == "--bind":
            source, target, *_ = value.split(":")
            binds.append((source, target))
        elif name == "--pwd":
            here = value
        elif name == "--env":
            key, _, text = value.partition("=")
            os.environ[key] = text
    for source, target in binds:
        there = Path(root + target)
        if Path(source).is_symlink():  # such as /bin
            there.symlink_to(Path(source).readlink())
            continue
        there.mkdir(parents=True, exist_ok=True)
        mount("--rbind", source, str(there))
    os.chroot(root)
    os.chdir(here)
    os.environ["PATH"] = os.pathsep.join(image["path"])


def mount(*words: str) -> None:
    """Call mount."""
    subprocess.run(["mount", *words], check=True)


def end(status: int) -> NoReturn:
    """End as the child did."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(os.WEXITSTATUS(status))


main()
