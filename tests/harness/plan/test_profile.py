"""Profiles of clusters: the shipped ones are valid, and mistakes are named with their key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.plan.cluster import load_profile, profile_names
from ssmttm.errors import InputError

PROFILE: dict[str, Any] = {
    "name": "c",
    "partitions": {"short": {"hours": 4, "nodes": 1}, "long": None},
    "nodes": 4,
    "gpus": 8,
    "gpu_memory_gib": 80,
    "cores": 64,
    "memory_gib": 500,
}


def write(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**PROFILE, **changes}, sort_keys=False))
    return str(path)


def test_the_shipped_profiles_are_valid_and_named_where_another_is_asked_for() -> None:
    assert {"h100x8", "a100x4-40gb", "shared-gpu", "devcluster"} <= set(profile_names())
    for name in profile_names():
        assert load_profile(name).name == name
    with pytest.raises(InputError, match=r"no such file or profile; the profiles are .*h100x8"):
        load_profile("nosuch")


def test_a_job_goes_to_the_partitions_that_take_it(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path))
    assert profile.partitions_for(1) == ["short", "long"]
    assert profile.partitions_for(2) == ["long"]
    assert profile.hours_in(["short", "long"]) == 4
    assert profile.hours_in(["long"]) == 24


@pytest.mark.parametrize("partitions", ["long", ["long"], {"long": None}, {"long": {}}], ids=str)
def test_partitions_without_limits_are_named_in_any_way(tmp_path: Path, partitions: Any) -> None:
    assert list(load_profile(write(tmp_path, partitions=partitions)).partitions) == ["long"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpus", -1),
        ("partitions", {}),
        ("gpu_memory_gib", None),
        ("limits", {"array": 5}),
        ("name", "a b"),
        ("node_failures", ["Xid ("]),
        ("node_failures", [".*"]),
        ("x", 1),
    ],
)
def test_a_wrong_key_of_a_profile_is_named(tmp_path: Path, key: str, value: Any) -> None:
    path = write(tmp_path, **{key: value})
    with pytest.raises(InputError, match=f"{path}.*{key}"):
        load_profile(path)


def test_jobs_that_would_save_as_soon_as_they_begin_are_refused(tmp_path: Path) -> None:
    minute = {"hours": 1 / 60}
    assert load_profile(write(tmp_path, limits=minute, signal_seconds=59)).signal_seconds == 59
    with pytest.raises(InputError, match=r"signal_seconds: 90 is no less than the 60 s of limits\.hours"):
        load_profile(write(tmp_path, limits=minute))
    with pytest.raises(InputError, match=r"partitions\.short\.hours"):
        load_profile(write(tmp_path, partitions={"short": minute}))


def test_root_must_lie_where_all_nodes_see_it(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, shared=[str(tmp_path)]))
    profile.check_shared("--root", tmp_path / "runs")
    with pytest.raises(InputError, match="shared directories"):
        profile.check_shared("--root", Path("/elsewhere"))
