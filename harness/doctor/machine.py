"""Checks of this machine: each tries what it checks, and gives a remedy if that does not work."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from harness.common.address import redact, without_passwords
from harness.common.disk import existing, free_bytes, write_atomically
from harness.common.extras import EXTRAS
from harness.common.format import GIB
from harness.common.gpus import PROC, read_gpus, why_no_gpu
from harness.plan.cluster import this_machine
from harness.plan.peaks import peak_flops
from harness.record.provenance import HOME, commit, installed_version
from harness.study.run import Frozen, Precision
from ssmttm.corpus.soundfont import soundfont
from ssmttm.errors import InputError
from ssmttm.files import parse_json
from ssmttm.locks import LEASE_SECONDS, has_locks

WITH_ADDRESSES = (
    *("studies/*/*.json", "studies/*/tune/*.json", "series/*/launch.json"),
    "mlflow-artifacts/**/study.json",
)
"""Files of ROOT in which an address may stand."""
CHANGE_THEM = "change them where others could read these files"


class Finding(Frozen):
    """The result of one check."""

    name: str
    works: bool
    found: str
    remedy: str | None = None
    needed: bool = False
    """True if training or reports are impossible without it."""

    @classmethod
    def of(cls, name: str, found: str, remedy: str | None = None, *, needed: bool = False) -> Finding:
        """Make a finding that works unless there is a remedy."""
        return cls(name=name, works=remedy is None, found=found, remedy=remedy, needed=needed)


def examine_machine(root: Path, *, fix: bool = False) -> Iterator[Finding]:
    """Make every check of this machine; takes seconds, since it imports the packages. `fix` as for `find_secrets`.

    Ray is imported by a process of its own while this one imports torch.
    """
    has_ray = importlib.util.find_spec("ray") is not None
    trying = _start_import("ray.dashboard.optional_deps") if has_ray else None
    yield _python()
    yield _hardware()
    yield gpus_here()
    yield _writable(root)
    yield _locks(root)
    yield find_secrets(root, fix=fix)
    yield from (_packages(name, extra.packages) for name, extra in EXTRAS.items() if extra.packages)
    if importlib.util.find_spec("torch") is not None:
        yield torch_device()
        yield _kernels()
    if trying is not None:
        yield _ray_dashboard(trying)
    yield _tried("soundfont", _soundfont, "pip install 'ssmscale[audio]'")
    yield try_program("git", _what_git_records(), "install git")


def try_program(name: str, meaning: str, remedy: str) -> Finding:
    """Check that a program starts with --version."""
    path = shutil.which(name)
    if path is None:
        return Finding.of(name, "not found", remedy)
    done = subprocess.run(
        [path, "--version"], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    first = (done.stdout or done.stderr).splitlines()
    found = f"{first[0] if first else path}: {meaning}"
    return Finding(name=name, works=done.returncode == 0, found=found)


def _what_git_records() -> str:
    """Describe what is recorded of the code, and whether git itself refuses its checkout, as another user's."""
    said = ""
    with contextlib.suppress(OSError):
        own = subprocess.run(["git", "-C", str(HOME), "status"], capture_output=True, text=True, check=False)
        said = next((line for line in own.stderr.splitlines() if "dubious ownership" in line), "")
    recorded = "the commit of the code is recorded" if commit() else "the code is recorded without a commit"
    return f"{recorded}, though git refuses its checkout ({said})" if said else recorded


def _python() -> Finding:
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    remedy = None if fits else "use Python 3.11, 3.12 or 3.13"
    return Finding.of("python", sys.version.split()[0], remedy, needed=True)


def _hardware() -> Finding:
    here = this_machine()
    return Finding.of("hardware", f"{here.cores} cores, {here.memory_gib:.3g} GiB, {here.gpus} GPUs")


def gpus_here() -> Finding:
    """Check that the driver tells of the GPUs that this process may use, and that their peaks are known."""
    found, name = read_gpus(), "GPUs"
    if found.problem is not None:
        is_here = bool(found.devices) or PROC.is_dir()
        text = f"{found}: {found.problem}"
        return Finding.of(
            name, text, "plans and `--on local` need NVML for the memory of GPUs" if is_here else None
        )
    without_memory = [gpu.name for gpu in found.devices if gpu.memory is None]
    unknown = {gpu.name for gpu in found.devices if peak_flops(gpu.name, Precision.BF16) is None}
    text = str(found)
    if without_memory:
        text += f"; the driver tells no memory of {without_memory[0]}, and plans count half of this machine's"
    if unknown:
        text += f"; the peak of {' and '.join(sorted(unknown))} is not known"
    remedy = "set resources.peak_flops in studies to the FLOP/s of the data sheet, dense" if unknown else None
    return Finding.of(name, text, remedy)


def _writable(root: Path) -> Finding:
    probe = existing(root.absolute()) / f".ssmscale-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        remedy = "choose another folder with --root or SSMSCALE_ROOT"
        return Finding.of("root", f"{root}: {error.strerror}", remedy, needed=True)
    return Finding.of("root", f"{root} is writable, {free_bytes(root.absolute()) / GIB:.0f} GiB free")


def _locks(root: Path) -> Finding:
    if has_locks(existing(root.absolute())):
        return Finding.of("locks", f"the file system of {root} locks files between processes")
    found = (
        f"the file system of {root} has no locks; leases replace them, and a dead host's run is free after "
    )
    return Finding.of(
        "locks",
        f"{found}{LEASE_SECONDS:.0f} s",
        "mount it with locks (Lustre: -o flock), or choose another --root",
    )


def find_secrets(root: Path, *, fix: bool) -> Finding:
    """Look for passwords that earlier versions wrote into files of ROOT; with `fix` leave them out of these files."""
    held = []
    for path in chain.from_iterable(root.glob(pattern) for pattern in WITH_ADDRESSES):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "://" not in text or redact(text) == text:
            continue
        with contextlib.suppress(ValueError):
            document = parse_json(text)
            if (kept := without_passwords(document)) != document:
                held.append(path)
                if fix:
                    mode = stat.S_IMODE(path.stat().st_mode)
                    write_atomically(path, json.dumps(kept, indent=1) + "\n", mode)
    files = ", ".join(map(str, held[:3])) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
    if not held:
        return Finding.of("secrets", f"no file under {root} holds a password")
    if fix:
        return Finding.of("secrets", f"left the passwords out of {files}; {CHANGE_THEM}")
    remedy = f"leave them out: ssmscale doctor --root {shlex.quote(str(root))} --fix; {CHANGE_THEM}"
    return Finding.of("secrets", f"passwords in {files}", remedy)


def _packages(name: str, packages: tuple[str, ...]) -> Finding:
    versions = {package: installed_version(package) for package in packages}
    found = ", ".join(f"{package} {version or 'missing'}" for package, version in versions.items())
    remedy = f"pip install 'ssmscale[{name}]'" if None in versions.values() else None
    return Finding.of(f"packages for {name}", found, remedy, needed=name in {"train", "analysis"})


def torch_device() -> Finding:
    """Check that torch computes on the GPUs that the driver shows: its CUDA must be one that the driver takes."""
    import torch

    found, name = read_gpus(), "torch device"
    try:
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.cuda.get_device_name(0) if seen else "CPU"
    except Exception as error:  # the user needs to see any error
        remedy = "install a torch for this machine's driver"
        return Finding.of(name, f"{type(error).__name__}: {error}", remedy)
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    text = f"{torch.__version__} on {device}, {built}" + (f"; {found.driver_words}" if found.driver else "")
    if seen or not found.present:
        return Finding.of(name, text)
    reason = why_no_gpu(found, torch.__version__, torch.version.cuda)
    return Finding.of(
        name, text, reason or "torch finds no GPU, though the driver shows some: restart the machine"
    )


def _kernels() -> Finding:
    from ssmttm.model.kernels import VARIABLE, chosen

    try:
        kernels = chosen()
    except InputError as error:
        return Finding.of("kernels", str(error), f"unset {VARIABLE}")
    found = f"mixers by {kernels.name}" + (f": {kernels.reason}" if kernels.reason else "")
    command = f"sh .ci/kernels {shlex.quote(sys.executable)}"
    remedy = f"in the checkout: {command}; without nvcc see ssmttm/README.md, CUDA kernels"
    return Finding.of("kernels", found, remedy if kernels.misses_package else None)


def _start_import(module: str) -> subprocess.Popen[str]:
    """Start a Python that imports a module."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"import {module}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ray_dashboard(trying: subprocess.Popen[str]) -> Finding:
    _, said = trying.communicate()
    name = "Ray's dashboard"
    if trying.returncode == 0:
        found = "its packages are installed; `status` shows its address while packed series train"
        return Finding.of(name, found)
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "its import failed")
    return Finding.of(name, last, "pip install 'ssmscale[ray]'")


def _soundfont() -> str:
    if not soundfont().is_file():
        raise FileNotFoundError("pretty_midi has no SoundFont")
    return soundfont().name


def _tried(name: str, attempt: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding.of(name, attempt())
    except Exception as error:  # the user needs to see any error
        return Finding.of(name, f"{type(error).__name__}: {error}", remedy)
