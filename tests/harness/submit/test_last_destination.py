"""What a retry takes for what it is not told."""

from __future__ import annotations

from typing import Any

import pytest

from harness.record.control import Control
from harness.record.registry import ResolvedStudy
from harness.submit.target import Options, as_before, last_options

PACKED = Options("ray", "h100x8", nodes=4)
ON_RAY = Options("ray", ray_address="http://h:8265")
HERE = Options("local")


def test_the_newest_submission_counts(resolved: ResolvedStudy) -> None:
    control = Control(resolved.root.study("tiny") / "control.jsonl")
    assert last_options(resolved) is None
    control.append("submitted", runs=[], dispatcher="ray", cluster="h100x8", job_id="77")
    assert last_options(resolved) == Options("ray", "h100x8")
    control.append(
        "submitted", runs=[], dispatcher="slurm", on="auto", cluster="h100x8", nodes=4, job_id="78"
    )
    assert last_options(resolved) == Options("auto", "h100x8", 4)
    control.append("submitted", runs=[], dispatcher="ray", on="ray", ray_address="http://h:8265", job_id="r")
    assert last_options(resolved) == ON_RAY


@pytest.mark.parametrize(
    ("said", "before", "meant"),
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
def test_what_is_not_said_is_as_before_and_goes_before_what_the_environment_says(
    said: dict[str, Any], before: Options | None, meant: Options
) -> None:
    assert as_before(Options(**said), before, "devcluster")[0] == meant
