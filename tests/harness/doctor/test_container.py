"""The doctor's checks of a container, against programs that answer as runtimes do."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.common.validation import validate
from harness.doctor.container import examine_container
from harness.doctor.machine import Finding
from harness.plan.cluster import Profile
from tests.conftest import REPOSITORY
from tests.programs import write_program

LAST_WORDS = 'while [ "$1" != env ]; do shift; done; exec "$@"'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first folder of PATH, whose python3 is this one."""
    folder = tmp_path / "programs"
    write_program(folder / "python3", f'exec {sys.executable} "$@"')
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def examine(**container: Any) -> dict[str, Finding]:
    fields = {
        "name": "c",
        "partitions": ["low"],
        "gpus": 0,
        "cores": 8,
        "memory_gib": 8,
        "container": container,
    }
    return {found.name: found for found in examine_container(validate(Profile, fields, "test"))}


def test_an_image_is_confirmed_by_the_python_in_it(programs: Path, tmp_path: Path) -> None:
    write_program(programs / "apptainer", LAST_WORDS)
    image = tmp_path / "a.sif"
    image.touch()
    findings = examine(runtime="apptainer", image=str(image))
    assert all(found.works for found in findings.values())
    assert "torch" in findings["python of the image"].found

    write_program(programs / "python3", f'exec {sys.executable} -I -S "$@"')
    without = examine(runtime="apptainer", image=str(image))["python of the image"]
    assert "without torch" in without.found
    write_program(programs / "apptainer", "echo 'FATAL: image format not recognized' >&2; exit 255")
    broken = examine(runtime="apptainer", image=str(image))["python of the image"]
    assert "does not start: FATAL: image format" in broken.found


def test_what_is_missing_is_named_with_a_remedy(programs: Path, tmp_path: Path) -> None:
    gone = str(tmp_path / "a.sif")
    findings = examine(runtime="apptainer", image=gone, mounts=["/nowhere:/data"])
    assert not findings["container runtime apptainer"].works
    assert f"{gone}: does not exist" in findings["image"].found
    assert findings["mounts"].found == "not on this machine: /nowhere"
    assert all(found.remedy for found in findings.values())


@pytest.mark.parametrize("has_plugin", [True, False])
def test_pyxis_is_known_by_the_options_of_srun(programs: Path, has_plugin: bool) -> None:
    write_program(programs / "srun", f"echo '  --{'container-image' if has_plugin else 'chdir'}=X'")
    findings = examine(runtime="pyxis", image="registry.example.org#train:1")
    assert findings["container runtime pyxis"].works is has_plugin
    assert "fetched by pyxis" in findings["image"].found


def test_the_recipe_of_the_image_copies_and_installs_what_there_is() -> None:
    recipe = (REPOSITORY / "slurm" / "apptainer.def").read_text()
    project = (REPOSITORY / "pyproject.toml").read_text()
    copied = re.findall(r"^    (\S+) /opt/ssmscale/", recipe, re.MULTILINE)
    assert {"pyproject.toml", "harness", "ssmttm", "analysis"} <= set(copied)
    assert all((REPOSITORY / name).exists() for name in copied)
    (extras,) = re.findall(r"/opt/ssmscale\[(.*?)\]", recipe)
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
