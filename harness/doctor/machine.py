"""Checks of this machine, each a try and not a guess, with a remedy where something does not work."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.common.disk import existing, free_bytes
from harness.common.extras import EXTRAS
from harness.common.format import GIB
from harness.plan.cluster import this_machine
from harness.record.provenance import installed_version
from harness.study.run import Frozen

NEEDED = frozenset({"train", "analysis"})


class Finding(Frozen):
    """One thing examined."""

    name: str
    works: bool
    found: str
    remedy: str | None = None
    needed: bool = False
    """True if nothing can be trained or reported without it."""


def examine_machine(root: Path) -> Iterator[Finding]:
    """Try everything on this machine; takes seconds, since the packages are imported."""
    yield _python()
    yield _hardware()
    yield _writable(root)
    yield from (_packages(name, extra.packages) for name, extra in EXTRAS.items() if extra.packages)
    if importlib.util.find_spec("torch") is not None:
        yield _torch()
        yield _kernels()
    if importlib.util.find_spec("ray") is not None:
        yield _ray_dashboard()
    yield _soundfont()
    yield try_program("git", "the commit of the code is recorded", "install git")


def try_program(name: str, meaning: str, remedy: str) -> Finding:
    """Start a program with --version."""
    path = shutil.which(name)
    if path is None:
        return Finding(name=name, works=False, found="not found", remedy=remedy)
    done = subprocess.run(
        [path, "--version"], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    first = (done.stdout or done.stderr).splitlines()
    return Finding(name=name, works=done.returncode == 0, found=f"{first[0] if first else path}: {meaning}")


def _python() -> Finding:
    version = sys.version.split()[0]
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding(
        name="python",
        works=fits,
        found=version,
        needed=True,
        remedy=None if fits else "use Python 3.11, 3.12 or 3.13",
    )


def _hardware() -> Finding:
    here = this_machine()
    found = f"{here.cores} cores, {here.memory_gib:.0f} GiB, {here.gpus} GPUs"
    return Finding(name="hardware", works=True, found=found)


def _writable(root: Path) -> Finding:
    probe = existing(root.absolute()) / f".ssmscale-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        remedy = "choose another place with --root or SSMSCALE_ROOT"
        return Finding(
            name="root", works=False, needed=True, found=f"{root}: {error.strerror}", remedy=remedy
        )
    free = free_bytes(root.absolute()) / GIB
    return Finding(name="root", works=True, found=f"{root} can be written, {free:.0f} GiB free")


def _packages(name: str, packages: tuple[str, ...]) -> Finding:
    versions = {package: installed_version(package) for package in packages}
    missing = [package for package, version in versions.items() if version is None]
    return Finding(
        name=f"packages for {name}",
        works=not missing,
        needed=name in NEEDED,
        found=", ".join(f"{package} {version or 'missing'}" for package, version in versions.items()),
        remedy=f"pip install 'ssmscale[{name}]'" if missing else None,
    )


def _torch() -> Finding:
    def attempt() -> str:
        import torch

        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
        return f"{torch.__version__} on {device}"

    return _tried("torch device", attempt, "install torch==2.13.0 for this machine")


def _kernels() -> Finding:
    from ssmttm.errors import InputError
    from ssmttm.model.kernels import NO_DEVICE, VARIABLE, chosen

    try:
        kernels = chosen()
    except InputError as error:
        return Finding(name="kernels", works=False, found=str(error), remedy=f"unset {VARIABLE}")
    wanted = kernels.reason not in {None, NO_DEVICE} and VARIABLE not in os.environ
    return Finding(
        name="kernels",
        works=not wanted,
        found=f"mixers by {kernels.name}" + (f": {kernels.reason}" if kernels.reason else ""),
        remedy="build them as the README says under Installing by hand" if wanted else None,
    )


def _ray_dashboard() -> Finding:
    def attempt() -> str:
        importlib.import_module("ray.dashboard.optional_deps")
        return "what it needs is installed: `status` tells where it is while packed series are trained"

    return _tried("Ray's dashboard", attempt, "pip install 'ssmscale[ray]'")


def _soundfont() -> Finding:
    def attempt() -> str:
        from ssmttm.corpus.packages import installed_folder

        found = sorted(installed_folder("pretty_midi").glob("*.sf2"))
        if not found:
            raise FileNotFoundError("pretty_midi has no SoundFont")
        return found[0].name

    return _tried("soundfont", attempt, "pip install 'ssmscale[audio]'")


def _tried(name: str, attempt: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(name=name, works=True, found=attempt())
    except Exception as error:  # whatever is wrong is what the user wants to read
        return Finding(name=name, works=False, found=f"{type(error).__name__}: {error}", remedy=remedy)
