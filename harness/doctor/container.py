"""Checks of a profile's container from this machine: its runtime, its image, and the packages in the image."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from harness.common.extras import EXTRAS
from harness.common.process import interpreter
from harness.common.validation import first_line
from harness.doctor.machine import Finding
from harness.plan.cluster import Profile
from harness.plan.container import PYXIS, Container
from ssmttm.errors import InputError

TRY_SECONDS = 120.0
"""Time limit of a program in the image; the first start of an image may have to unpack it."""
LOOK = """\
import importlib.util, json, sys
print(json.dumps([sys.version.split()[0], [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]]))
"""


def examine_container(profile: Profile) -> Iterator[Finding]:
    """Check the container of a profile as far as this machine shows it; a profile without one yields nothing."""
    if (container := profile.container) is None:
        return
    runtime = container_runtime(container)
    yield runtime
    yield image(profile, container)
    gone = [source for mount in container.mounts if not Path(source := mount.split(":")[0]).exists()]
    remedy = "correct mounts, unless the nodes have them" if gone else None
    there = f"{len(container.mounts)} besides those of jobs"
    yield Finding.of("mounts", f"not on this machine: {', '.join(gone)}" if gone else there, remedy)
    if (
        runtime.works
        and container.runtime != PYXIS
        and container.image_file
        and container.image_file.exists()
    ):
        yield packages(container)


def container_runtime(container: Container) -> Finding:
    """Check that the runtime is here: a program, or srun's plugin."""
    name = f"container runtime {container.runtime}"
    if container.runtime != PYXIS:
        path = shutil.which(container.runtime)
        remedy = (
            "install it, or load its module here and in the lines of setup; the nodes may have it already"
        )
        return Finding.of(name, path or "not found on this machine", None if path else remedy)
    try:
        done = subprocess.run(["srun", "--help"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding.of(
            name, f"srun: {first_line(error)}", "run this on a login node of the cluster", needed=True
        )
    if "--container-image" in done.stdout:
        return Finding.of(name, "srun has --container-image", needed=True)
    remedy = "ask the site for the plugin, or set container.runtime to apptainer"
    return Finding.of(name, "srun here has no option --container-image", remedy, needed=True)


def image(profile: Profile, container: Container) -> Finding:
    """Check that an image that is a path is here, and where all nodes see it."""
    if container.image_file is None:
        return Finding.of("image", f"{container.image}: fetched by {container.runtime} when a job starts")
    try:
        profile.check_container()
    except InputError as error:
        return Finding.of("image", str(error), "correct container.image in the profile", needed=True)
    return Finding.of("image", container.image)


def packages(container: Container) -> Finding:
    """Start the Python of the image as a job would, and look for the packages that training needs."""
    name, wanted = "python of the image", EXTRAS["train"].packages
    remedy = "build the image again (slurm/README.md), or correct flags and mounts"
    command = container.command([], interpreter("-c", LOOK, *wanted), [Path.cwd()])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_SECONDS, check=True)
        version, missing = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or [f"status {error.returncode}"])[-1][:300]
        return Finding.of(name, f"does not start: {said}", remedy, needed=True)
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return Finding.of(name, f"does not start: {first_line(error)}", remedy, needed=True)
    found = f"Python {version} with {', '.join(name for name in wanted if name not in missing) or 'none'}"
    if missing:
        return Finding.of(name, f"{found}, without {', '.join(missing)}", remedy, needed=True)
    return Finding.of(name, found, needed=True)
