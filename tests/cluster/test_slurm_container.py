"""On a real SLURM: every program of a job that trains runs in the profile's container.

This machine has neither Apptainer nor Pyxis: stand-ins take their place, whose docstrings say what they do.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.record.journal import Event
from slurm.devcluster.cluster import DevCluster
from tests.cluster.slurm_study import PROFILE, SlurmStudy
from tests.conftest import REPOSITORY
from tests.harness.trainer import losses
from tests.studies import Fields
from tests.waiting import PACED

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent


class Site:
    """A folder apart from /tmp, which containers show: programs, an image and a study of the corpus beside it."""

    def __init__(self, cluster: DevCluster, fields: Fields, program: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="site-", dir="/var/tmp"))
        self.cluster, self.fields, self.program = cluster, copy.deepcopy(fields), program
        shutil.copytree(self.fields["corpus"]["path"], self.folder / "corpus")
        self.fields["corpus"]["path"] = str(self.folder / "corpus")
        self.programs, self.bin = self.folder / "programs", self.folder / "programs" / "bin"
        self.bin.mkdir(parents=True)
        source = (HERE / f"standin_{'pyxis' if program == 'srun' else program}.py").read_text()
        write(self.programs / program, f"#!{sys.executable}\n{source}")
        python = f'PYTHONPATH="$PYTHONPATH:{PACED}" exec {sys.executable} "$@"'
        write(self.bin / "python3", f"#!/bin/sh\n{python}\n")
        self.image = self.folder / "the images" / "train.sif"
        self.image.parent.mkdir()
        folders = ["/bin", "/lib", "/lib64", "/usr", "/etc", sys.prefix, sys.base_prefix, str(self.bin)]
        self.image.write_text(json.dumps({"folders": folders, "path": [str(self.bin), "/usr/bin", "/bin"]}))

    def study(self, **container: Any) -> SlurmStudy:
        """Return a study whose jobs run in a container."""
        return SlurmStudy(
            self.cluster, self.folder / "study", self.fields, {**PROFILE, "container": container}
        )

    def started(self) -> list[list[str]]:
        """Return the command lines that the stand-in was given."""
        lines = (self.programs / "started.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def write(program: Path, text: str) -> None:
    program.write_text(text)
    program.chmod(0o755)


@pytest.fixture
def site(
    request: pytest.FixtureRequest,
    devcluster: DevCluster,
    study_fields: Fields,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Site]:
    site = Site(devcluster, study_fields, request.param)
    monkeypatch.setenv("PATH", f"{site.programs}{os.pathsep}{os.environ['PATH']}")
    try:
        yield site
        SlurmStudy(devcluster, site.folder / "study", site.fields).slurm("scancel", "--user=root")
        SlurmStudy(devcluster, site.folder / "study", site.fields).wait_until_over()
    finally:
        shutil.rmtree(site.folder)


@pytest.mark.parametrize("site", ["apptainer"], indirect=True)
def test_ranks_run_in_the_image_see_what_they_need_and_go_on_after_a_signal(site: Site) -> None:
    data = site.folder / "data"
    data.mkdir()
    study = site.study(
        runtime="apptainer", image=str(site.image), mounts=[f"{data}:/data:ro"], flags=["--env=INSIDE=1"]
    )
    study.step_seconds = 0.2
    study.submit()
    study.wait_for_step(2)
    (series,) = study.series()
    (rank, *_) = [
        process for process in study.ranks(series) if "apptainer" not in " ".join(process.cmdline())
    ]
    root = Path(f"/proc/{rank.pid}/root")
    shown = {path.name for path in (root / "var" / "tmp" / site.folder.name).iterdir()}
    assert shown == {"corpus", "study", "programs"}
    assert list((root / "var" / "tmp" / site.folder.name / "study").iterdir()) == [
        root / "var" / "tmp" / site.folder.name / "study" / "runs"
    ]
    assert (root / "data").is_dir()
    assert rank.environ()["INSIDE"] == "1"
    assert rank.environ()["PYTHONPATH"] == f"{REPOSITORY}:{PACED}"
    study.near_time_limit(series)
    study.wait_until_over()
    assert len(losses(study.root, study.fields)) == 2
    assert study.count(Event.PREEMPTED) >= 1
    assert study.count(Event.RESUMED) >= 1
    first, *others = site.started()
    assert others, "the requeued job started outside"
    for words in (first, *others):
        assert words[:1] == ["exec"]
        assert {f"--bind={study.root.path}:{study.root.path}", f"--bind={data}:/data:ro", "--nv"} < set(words)
        assert words[words.index(str(site.image)) + 1] == "env"


@pytest.mark.verify
@pytest.mark.parametrize("site", ["apptainer"], indirect=True)
def test_a_packed_job_runs_ray_and_its_controller_in_the_image(site: Site) -> None:
    study = site.study(runtime="apptainer", image=str(site.image))
    study.submit(on="ray")
    study.wait_until_over()
    assert len(losses(study.root, study.fields)) == 2
    modules = {word for words in site.started() for word in words if word.startswith("harness.")}
    assert modules == {"harness.dispatch.ray.node_agent", "harness.dispatch.ray.controller"}


@pytest.mark.verify
@pytest.mark.parametrize("site", ["srun"], indirect=True)
def test_with_pyxis_srun_starts_rays_agents_and_the_controller_in_the_image(site: Site) -> None:
    study = site.study(runtime="pyxis", image="registry.example.org#team/train:1")
    study.submit(on="ray")
    study.wait_until_over()
    assert len(losses(study.root, study.fields)) == 2
    starts = site.started()
    modules = {word for words in starts for word in words if word.startswith("harness.")}
    assert modules == {"harness.dispatch.ray.node_agent", "harness.dispatch.ray.controller"}
    for words in starts:
        assert "--container-image=registry.example.org#team/train:1" in words
        (mounts,) = [word for word in words if word.startswith("--container-mounts=")]
        assert f"{study.root.path}:{study.root.path}" in mounts
        assert f"{site.folder / 'corpus'}" in mounts


@pytest.mark.parametrize("site", ["apptainer"], indirect=True)
def test_a_missing_image_is_refused_before_anything_is_written_and_by_plan_too(site: Site) -> None:
    study = site.study(runtime="apptainer", image=str(site.image))
    site.image.unlink()
    said = study.submit(status=2)
    assert f"--cluster dev: container.image: {site.image}: does not exist" in said
    answer = study.call("plan", "--cluster", str(study.profile_path))
    assert answer.status == 2
    assert "container.image" in answer.err
    assert study.queue() == []
    assert not study.root.path.exists()
