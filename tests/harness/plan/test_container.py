"""The container of a profile: mistakes are named with file, key and value, and command lines need no shell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.common.process import interpreter
from harness.dispatch.arrays import new_array
from harness.dispatch.part import Part
from harness.plan.allocation import Shape
from harness.plan.cluster import load_profile
from harness.plan.container import Container, contained
from harness.record.provenance import HOME
from ssmttm.errors import InputError
from tests.harness.plan.test_profile import write

IMAGE = "docker://registry.example.org/train:1"
APPTAINER = {"runtime": "apptainer", "image": IMAGE}
PYXIS = {"runtime": "pyxis", "image": "registry.example.org#team/train:1"}


@pytest.mark.parametrize(
    ("container", "said"),
    [
        ({"image": IMAGE}, "container.runtime: is missing"),
        ({"runtime": "apptainer"}, "container.image: is missing"),
        ({**APPTAINER, "runtime": "docker"}, "container.runtime: 'docker'"),
        (
            {**APPTAINER, "mount": []},
            "container.mount: unknown key (its value is []); did you mean 'mounts'?",
        ),
        (
            {**APPTAINER, "image": "images/a.sif"},
            "container.image: 'images/a.sif': is no image: write an absolute",
        ),
        ({**APPTAINER, "image": "-x"}, "container.image: '-x': is no image"),
        ({**PYXIS, "image": "./a.sqsh"}, "container.image: './a.sqsh': is no image"),
        ({**APPTAINER, "mounts": "/data"}, "container.mounts: '/data': input should be a list"),
        ({**APPTAINER, "mounts": ["data:/data"]}, "'data:/data' is no mount: write SRC, SRC:DST"),
        ({**APPTAINER, "mounts": ["/a:/b:rx"]}, "'/a:/b:rx' is no mount: after SRC:DST only :ro"),
        ({**APPTAINER, "mounts": ["/a,/b"]}, "no container mounts a path with ',' in it"),
        ({**APPTAINER, "mounts": ["/a:/"]}, "'/a:/' is no mount"),
        ({**PYXIS, "mounts": ["/my data"]}, "pyxis mounts no path with a blank in it"),
        ({**APPTAINER, "flags": ["--env", "A=1"]}, "'A=1' is no flag; write a flag and its value as one"),
        ({**APPTAINER, "flags": ["--"]}, "'--' is no flag"),
        ({**APPTAINER, "flags": ["--cleanenv"]}, "'--cleanenv' hides SLURM's variables"),
        ({**PYXIS, "flags": ["--container-image=x"]}, "'--container-image=x' is set already"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_container_is_refused_with_file_key_and_value(
    tmp_path: Path, container: dict[str, Any], said: str
) -> None:
    path = write(tmp_path, container=container)
    with pytest.raises(InputError) as refused:
        load_profile(path)
    assert str(refused.value).startswith(f"{path}: container.")
    assert said in str(refused.value)


def test_a_missing_image_or_a_path_that_cannot_be_mounted_is_named(tmp_path: Path) -> None:
    gone = load_profile(write(tmp_path, container={**APPTAINER, "image": str(tmp_path / "a.sif")}))
    with pytest.raises(InputError, match=r"--cluster c: container\.image: .*a\.sif: does not exist"):
        gone.check_container()
    fetched = load_profile(write(tmp_path, container=PYXIS))
    fetched.check_container({"--root": tmp_path})
    for name, said in (("a:b", "with ':' in it"), ("a,b", "with ',' in it"), ("a b", "with a blank in it")):
        with pytest.raises(InputError, match=f"--root: .*{said}; choose another path"):
            fetched.check_container({"--root": tmp_path / name})


def test_an_image_on_a_disk_that_nodes_do_not_share_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "a.sif"
    image.touch()
    container = {**APPTAINER, "image": str(image)}
    profile = load_profile(write(tmp_path, container=container, shared=[str(tmp_path / "shared")]))
    with pytest.raises(
        InputError, match=r"container\.image: .*a\.sif: lies in none of the shared directories"
    ):
        profile.check_container()


def test_the_image_gets_its_own_python_the_paths_of_the_job_and_words_that_no_shell_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    root, corpus, link = Path("/usr/share"), Path("/etc"), tmp_path / "link"
    link.symlink_to("/opt")
    image = "/my images/$(a).sif"
    container = Container(
        runtime="apptainer", image=image, mounts=("/data", "/x y:/z:ro"), flags=("--env=A=$B",)
    )
    paths = [root, corpus, link, Path("/nowhere")]
    words = contained(container.with_gpus(), ["srun"], interpreter("-m", "m", "a b"), paths)
    before, after = words[: words.index(image)], words[words.index(image) + 1 :]
    assert before[:3] == ["srun", "apptainer", "exec"]
    binds = [word.removeprefix("--bind=") for word in before if word.startswith("--bind=")]
    assert {"/usr/share:/usr/share", "/etc:/etc", "/opt:/opt", "/tmp:/tmp"} <= set(binds)
    assert binds[-2:] == ["/data:/data", "/x y:/z:ro"]
    assert not any("/nowhere" in word for word in words)
    assert before[-3:] == ["--pwd=/usr/share", "--nv", "--env=A=$B"]
    assert after[0] == "env"
    assert f"PYTHONPATH={HOME}" in after
    assert after[-5:] == ["python3", "-P", "-m", "m", "a b"]
    assert contained(None, ["srun"], ["python", "x"], paths) == ["srun", "python", "x"]


def test_a_flag_for_another_gpu_takes_the_place_of_nv() -> None:
    assert Container(runtime="singularity", image=IMAGE, flags=("--rocm",)).with_gpus().flags == ("--rocm",)


def test_pyxis_gets_options_of_srun_and_keeps_the_users_id_unless_flags_say_otherwise() -> None:
    container = Container(**PYXIS, mounts=("/data:/d",), flags=("--no-container-mount-home",)).with_gpus()
    words = contained(container, ["srun", "--ntasks=2"], interpreter("-m", "m"), [Path("/usr")])
    assert words[:3] == ["srun", "--ntasks=2", "--container-image=registry.example.org#team/train:1"]
    assert words[3].endswith(",/data:/d")
    assert "--no-container-remap-root" in words
    assert "--container-mount-home" not in words
    assert "--nv" not in words
    assert words[-3:] == ["-P", "-m", "m"]


def test_the_digest_of_an_array_holds_its_container_and_arrays_without_one_keep_theirs() -> None:
    shape = Shape(nodes=1, ranks=1, threads=1, memory_gib=1)
    plain = new_array("ssmscale-a", shape, [])
    boxed = plain.model_copy(update={"container": Container(**APPTAINER)})
    other = plain.model_copy(update={"container": Container(**{**APPTAINER, "image": f"{IMAGE}2"})})
    assert len({array.digest for array in (plain, boxed, other)}) == 3
    assert plain.digest == "dca84f216a92c491ce62f824285706c45439476bb966d130d703f8e4a2c5eb7e"


def test_a_part_shows_the_paths_of_its_request(tmp_path: Path) -> None:
    (tmp_path / "music").mkdir()
    request = {"from": [str(tmp_path / "music")], "to": {"out": str(tmp_path / "new" / "x")}, "rate": 1}
    part = Part.of(tmp_path / "work" / "parts" / "0", "build", request)
    assert part.paths == [tmp_path / "work", tmp_path / "music", tmp_path]
