"""Where a submission goes, and what of --on, --cluster, --nodes and --snapshot does not go together."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.submit.target import target_of
from ssmttm.errors import InputError
from tests.conftest import Answer


@pytest.mark.parametrize("on", ["slurm", "ray", "auto"])
def test_a_cluster_is_taken_as_it_is_asked_for(on: str) -> None:
    there = target_of(on, "h100x8", snapshot=True)
    assert there.profile is not None
    assert (there.on, there.profile.name, there.profile.snapshot) == (on, "h100x8", True)


def test_without_a_cluster_auto_and_ray_are_this_machine() -> None:
    assert (target_of("ray", None).on, target_of("ray", None).profile) == ("ray", None)
    assert target_of("auto", None).on == target_of("local", "h100x8").on == "local"
    assert target_of("local", "h100x8").profile is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"on": "moon", "cluster": None},
            "--on moon: there is no such dispatcher; there are local, slurm, ray and",
        ),
        ({"on": "slurm", "cluster": None}, "--on slurm: name the cluster with --cluster; there are .*h100x8"),
        ({"on": "slurm", "cluster": "h100x8", "nodes": 2}, "--nodes 2: is for series that are packed"),
        ({"on": "ray", "cluster": "h100x8", "nodes": 17}, "--nodes 17: h100x8 gives a job at most 16 nodes"),
        ({"on": "local", "cluster": None, "nodes": 2}, "--nodes 2: is for series that are packed"),
        ({"on": "ray", "cluster": None, "nodes": 2}, "--nodes 2: .* name the cluster with --cluster"),
        ({"on": "local", "cluster": None, "snapshot": True}, "--snapshot: is for jobs that wait in a queue"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        target_of(**asked)


def test_where_ray_is_not_installed_its_extra_is_named_and_auto_makes_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else real(name))
    with pytest.raises(InputError, match=r"--on ray: the package ray is not installed; .*ssmscale\[ray\]"):
        target_of("ray", "h100x8")
    assert target_of("auto", "h100x8").on == "slurm"
    assert "Ray is not installed" in capsys.readouterr().err


def test_a_cluster_of_the_environment_alone_does_not_keep_a_search_from_being_packed_here(
    monkeypatch: pytest.MonkeyPatch,
    ssmscale: Callable[..., Answer],
    study_fields: dict[str, Any],
    write_study: Callable[..., Path],
) -> None:
    study = write_study(study_fields)  # in which there is nothing to tune
    named = ssmscale("tune", study, "--on", "ray", "--cluster", "h100x8")
    assert named.err.startswith(
        "error: --on ray --cluster h100x8: a search packs trials on this machine only"
    )
    monkeypatch.setenv("SSMSCALE_CLUSTER", "h100x8")
    assert ssmscale("tune", study, "--on", "ray").err.startswith(f"error: {study}: tune: ")
