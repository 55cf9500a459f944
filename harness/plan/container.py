"""The container of a profile: its keys, and the command line that starts a program of a job inside.

Images hold none of SLURM's programs. So the process that supervises a job stays outside and runs with the Python that
submitted it, which needs neither torch nor Ray; every process that it starts goes through `contained`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, field_validator

from harness.common.validation import usable_path
from harness.record.provenance import HOME
from harness.study.run import Frozen
from ssmttm.errors import InputError

PYXIS = "pyxis"
ADDRESS = re.compile(r"[a-z][a-z0-9+-]*://\S+")
"""Form of an image that Apptainer fetches, such as docker://HOST/NAME:TAG."""
PYXIS_NAME = re.compile(r"[A-Za-z0-9]\S*")
"""Form of an image that Enroot fetches, such as HOST#NAME:TAG."""
INSTALLED = ("site-packages", "dist-packages")
"""Folders of installed packages, which fit one Python alone."""
HIDING = ("-e", "--cleanenv", "-C", "--containall")
"""Apptainer's flags that hide the variables by which ranks know their place."""
OWN_FLAGS = {"--container-image": "is container.image", "--container-workdir": "is ROOT"}
"""Pyxis's flags that may stand once, and their values."""


class Container(Frozen):
    """The container in which a cluster's jobs run."""

    runtime: Literal["apptainer", "singularity", "pyxis"]
    """Program that runs it; pyxis is a plugin of srun."""
    image: str
    """Path of an image, or the address or name by which the runtime fetches one."""
    mounts: tuple[str, ...] = ()
    """Paths that it shows besides those that a job needs: SRC, SRC:DST, or SRC:DST:ro."""
    flags: tuple[str, ...] = ()
    """Further flags of `apptainer exec`, or of srun."""

    @field_validator("image")
    @classmethod
    def _image_is_found_from_anywhere(cls, value: str, info: ValidationInfo) -> str:
        value = usable_path(value)
        is_pyxis = info.data.get("runtime") == PYXIS
        if value.startswith("/") or (PYXIS_NAME if is_pyxis else ADDRESS).fullmatch(value):
            return value
        fetched = "a name such as HOST#NAME:TAG" if is_pyxis else "an address such as docker://HOST/NAME:TAG"
        raise ValueError(f"is no image: write an absolute path, or {fetched}")

    @field_validator("mounts")
    @classmethod
    def _mounts_are_paths(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        return tuple(_complete_mount(mount, info.data.get("runtime")) for mount in value)

    @field_validator("flags")
    @classmethod
    def _flags_are_flags(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        is_pyxis = info.data.get("runtime") == PYXIS
        for flag in value:
            name = flag.partition("=")[0]
            if not re.fullmatch(r"-[A-Za-z]|--[A-Za-z][\w-]*", name) or "\0" in flag:
                raise ValueError(f"{flag!r} is no flag; write a flag and its value as one, --name=value")
            if is_pyxis and name in OWN_FLAGS:
                raise ValueError(f"{flag!r} is set already: it {OWN_FLAGS[name]}; remove it")
            if not is_pyxis and name in HIDING:
                raise ValueError(
                    f"{flag!r} hides SLURM's variables, by which ranks know their place; remove it"
                )
        return value

    @property
    def image_file(self) -> Path | None:
        """Path of the image; None if the runtime fetches it."""
        return Path(self.image) if self.image.startswith("/") else None

    def check_image(self, where: str) -> None:
        """Raise InputError if the image should be here and is not."""
        if self.image_file is not None and not self.image_file.exists():
            raise InputError(
                f"{where}: container.image: {self.image}: does not exist; correct the path, or build the image "
                "(slurm/README.md)"
            )

    def check_paths(self, places: Mapping[str, Path]) -> None:
        """Raise InputError if the container cannot show one of these paths; each is named as the user gave it."""
        for option, path in [*places.items(), *(("the code", path) for path in _code())]:
            for shown in _spellings(path):
                if (found := _unmountable(str(shown), self.runtime)) is not None:
                    raise InputError(f"{option}: {shown}: {found}; choose another path, or remove container")

    def with_gpus(self) -> Container:
        """Return the container with the driver of the node's NVIDIA GPUs, unless its flags choose another."""
        if self.runtime == PYXIS or {"--nv", "--nvccli", "--rocm"} & set(self.flags):
            return self
        return self.model_copy(update={"flags": ("--nv", *self.flags)})

    def command(self, launcher: Sequence[str], command: Sequence[str], paths: Iterable[Path]) -> list[str]:
        """Return the command line by which a launcher starts a command inside, with these paths shown.

        The launcher is an srun with its options, or nothing where one process starts on this node: pyxis needs srun.
        """
        needed = [path for path in paths if path.exists()]
        taken = {mount.split(":")[1] for mount in self.mounts}
        ours = [path for path in _shown([*needed, *_code(), *_temporary()]) if str(path) not in taken]
        mounts = [*(f"{path}:{path}" for path in ours), *self.mounts]
        start, there = needed[0].absolute(), _inside(command)
        if self.runtime == PYXIS:
            options = [f"--container-image={self.image}", f"--container-mounts={','.join(mounts)}"]
            return [
                *launcher,
                *options,
                f"--container-workdir={start}",
                *self._of_the_user(),
                *self.flags,
                *there,
            ]
        binds = [f"--bind={mount}" for mount in mounts]
        return [*launcher, self.runtime, "exec", *binds, f"--pwd={start}", *self.flags, self.image, *there]

    def _of_the_user(self) -> list[str]:
        """Return Pyxis's flags that give what Apptainer gives by itself: the user's id, home and command."""
        asked = [
            ("--no-container-remap-root", "--container-remap-root"),
            ("--container-mount-home", "--no-container-mount-home"),
            ("--no-container-entrypoint", "--container-entrypoint"),
        ]
        return [flag for flag, other in asked if not {flag, other} & set(self.flags)]


def contained(
    container: Container | None, launcher: Sequence[str], command: Sequence[str], paths: Iterable[Path]
) -> list[str]:
    """Return the command line by which a launcher starts a Python command of `interpreter`, in a container if any.

    `paths` are those that the command reads and writes; the first becomes its working directory there.
    """
    return [*launcher, *command] if container is None else container.command(launcher, command, paths)


def _inside(command: Sequence[str]) -> list[str]:
    """Return the command for the Python of the image.

    The code is this process's, as long as it lies apart from the packages of another Python; else the image's.
    Neither the host's packages nor those in the user's home are meant for that Python.
    """
    own = [f"PYTHONPATH={path}" for path in _code()]
    hidden = ("-u", "PYTHONHOME", "-u", "PYTHONPATH")
    # env replaces itself by Python, so that signals reach Python.
    return ["env", *hidden, "PYTHONNOUSERSITE=1", *own, "python3", *command[1:]]


def _code() -> list[Path]:
    """Return the folder of the code, unless it lies among packages that fit one Python alone."""
    return [] if HOME.name in INSTALLED else [HOME]


def _temporary() -> list[Path]:
    """Return the folders of temporary files: Ray's processes meet there, each in a container of its own."""
    folders = (Path(folder) for folder in ("/tmp", os.environ.get("TMPDIR", "")))  # noqa: S108
    return [folder for folder in folders if folder.is_absolute() and folder.is_dir()]


def _shown(paths: Iterable[Path]) -> list[Path]:
    """Return the paths with their links followed, then as they are written, without those that lie in another one.

    A link that is shown must lead to what is there already.
    """
    spelled = [_spellings(path) for path in paths]
    real, written = {path for path, _ in spelled}, {path for _, path in spelled}
    kept: list[Path] = []
    for path in [*sorted(real), *sorted(written - real)]:
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


def _spellings(path: Path) -> tuple[Path, Path]:
    """Return a path with its links followed, and as it is written."""
    return Path(os.path.realpath(path)), path.absolute()


def _complete_mount(mount: str, runtime: str | None) -> str:
    """Return SRC:DST or SRC:DST:ro of a mount; raises ValueError if it is none."""
    source, *rest = mount.split(":")
    source = usable_path(source)
    target = rest[0] if rest else source
    for path in (source, target):
        if not path.startswith("/") or path.strip("/") == "" or _unmountable(path, runtime):
            form = "SRC, SRC:DST or SRC:DST:ro with absolute paths below /"
            raise ValueError(f"{mount!r} is no mount: {_unmountable(path, runtime) or f'write {form}'}")
    if rest[1:] not in ([], ["ro"], ["rw"]):
        raise ValueError(f"{mount!r} is no mount: after SRC:DST only :ro may stand")
    return ":".join([source, target, *(["ro"] if rest[1:] == ["ro"] else [])])


def _unmountable(path: str, runtime: str | None) -> str | None:
    """Return the reason why a runtime cannot mount a path; None if it can."""
    held = next((sign for sign in ":," if sign in path), None)
    if held is not None:
        return f"no container mounts a path with {held!r} in it"
    if runtime == PYXIS and re.search(r"\s", path):
        return "pyxis mounts no path with a blank in it"
    return None
