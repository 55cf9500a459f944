"""The target of a submission by its options, and of a retry by those of the last submission."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from harness.record.control import Control
from harness.record.registry import ResolvedStudy
from harness.submit.target import Options, as_before, last_options, target_of
from ssmttm.errors import InputError
from tests.conftest import Command, Write


@pytest.mark.parametrize("on", ["slurm", "ray", "auto"])
def test_a_named_cluster_is_the_target(on: str) -> None:
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
            "--on moon: no such backend; choose one of local, slurm, ray",
        ),
        ({"on": "slurm", "cluster": None}, "--on slurm: name the cluster with --cluster: .*h100x8"),
        ({"on": "slurm", "cluster": "h100x8", "nodes": 2}, "--nodes 2: applies to packed series"),
        ({"on": "ray", "cluster": "h100x8", "nodes": 17}, "--nodes 17: h100x8 allows a job at most 16 nodes"),
        ({"on": "local", "cluster": None, "nodes": 2}, "--nodes 2: applies to packed series"),
        ({"on": "ray", "cluster": None, "nodes": 2}, "--nodes 2: .* name the cluster with --cluster"),
        ({"on": "local", "cluster": None, "snapshot": True}, "--snapshot: applies to queued jobs"),
    ],
)
def test_options_that_contradict_each_other_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        target_of(**asked)


def test_without_ray_its_extra_is_named_and_auto_submits_separate_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else real(name))
    with pytest.raises(InputError, match=r"--on ray: the package ray is not installed; .*ssmscale\[ray\]"):
        target_of("ray", "h100x8")
    assert target_of("auto", "h100x8").on == "slurm"
    assert "Ray is not installed" in capsys.readouterr().err


def test_a_search_is_packed_here_unless_a_cluster_is_named_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
    ssmscale: Command,
    study_fields: dict[str, Any],
    write_study: Write,
) -> None:
    study = write_study(study_fields)  # without a search space
    named = ssmscale("tune", study, "--on", "ray", "--cluster", "h100x8")
    assert named.err.startswith(
        "error: --on ray --cluster h100x8: a search packs trials on this machine only"
    )
    monkeypatch.setenv("SSMSCALE_CLUSTER", "h100x8")
    assert ssmscale("tune", study, "--on", "ray").err.startswith(f"error: {study}: tune: ")


PACKED = Options("ray", "h100x8", nodes=4)
ON_RAY = Options("ray", ray_address="http://h:8265")
HERE = Options("local")


def test_the_options_of_the_last_submission_are_read(resolved: ResolvedStudy) -> None:
    control = Control(resolved.root.study("tiny") / "control.jsonl")
    assert last_options(resolved, Options()) is None
    control.append("submitted", runs=[], dispatcher="ray", cluster="h100x8", job_id="77")
    assert last_options(resolved, Options()) == Options("ray", "h100x8")
    control.append(
        "submitted", runs=[], dispatcher="slurm", on="auto", cluster="h100x8", nodes=4, job_id="78"
    )
    assert last_options(resolved, Options()) == Options("auto", "h100x8", 4)
    control.append("submitted", runs=[], dispatcher="ray", on="ray", ray_address="http://h:8265", job_id="r")
    assert last_options(resolved, Options()) == ON_RAY


@pytest.mark.parametrize(
    ("given", "before", "complete"),
    [
        ({}, PACKED, PACKED),
        ({"nodes": 2}, PACKED, Options("ray", "h100x8", 2)),
        ({"cluster": "h100x8"}, PACKED, PACKED),
        ({"cluster": "a100x4-40gb"}, PACKED, Options("ray", "a100x4-40gb")),
        ({"on": "slurm"}, PACKED, Options("slurm", "h100x8")),
        ({"on": "auto"}, PACKED, Options("auto", "h100x8", 4)),
        ({"on": "local"}, PACKED, HERE),
        ({}, ON_RAY, ON_RAY),
        ({"on": "slurm"}, ON_RAY, Options("slurm", "devcluster")),
        ({"ray_address": "http://i:1"}, PACKED, Options("ray", ray_address="http://i:1")),
        ({}, HERE, HERE),
        ({"cluster": "h100x8"}, HERE, Options("auto", "h100x8")),
        ({}, Options("ray"), Options("ray")),
        ({}, None, Options("auto", "devcluster")),
    ],
)
def test_options_not_given_are_those_of_the_last_submission_rather_than_of_the_environment(
    given: dict[str, Any], before: Options | None, complete: Options
) -> None:
    assert as_before(Options(**given), before, "devcluster")[0] == complete
