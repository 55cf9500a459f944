"""A corpus as tasks: what each is given, and how a task stops and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.corpora import part as work_of_part
from harness.corpora.build import CorpusTasks, forget_tasks, open_tasks
from harness.dispatch.base import SubmitTarget
from harness.dispatch.slurm.backend import SlurmBackend
from harness.plan.cluster import Profile
from harness.record.journal import read_progress
from harness.submit.parts import PartState
from harness.train.part import work_on
from harness.train.stopping import StopFlag
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.manifest import load_manifest
from ssmttm.corpus.progress import Progress
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError
from tests.ssmttm.neural import write_model

PROFILE = {"name": "dev", "partitions": {"low": None}, "nodes": 2, "cores": 8, "memory_gib": 16}
GPUS = {"gpus": 2, "gpu_memory_gib": 80}


@pytest.fixture
def spec(tmp_path: Path) -> BuildSpec:
    """Eight recordings of 4 to 11 s."""
    import soundfile

    root = tmp_path / "music"
    root.mkdir()
    for number in range(8):
        seconds = np.arange((4 + number) * 16000) / 16000
        tone = np.sin(2 * np.pi * (200 + 30 * number) * seconds * (1 + seconds // 1 % 3))
        soundfile.write(root / f"{number}.wav", 0.3 * tone, 16000)
    (root / "captions.csv").write_text("path,caption\n" + "".join(f"{n}.wav,Tone {n}.\n" for n in range(8)))
    sizes = {"codebooks": 1, "codebook_size": 16, "segment_seconds": 2.0, "valid": 0.25}
    return BuildSpec.model_validate({"source": "folder", "audio": root, **sizes})


def tasks_of(spec: BuildSpec, out: Path, parts: int | None = 3) -> CorpusTasks:
    return open_tasks(spec, out, "cpu", SubmitTarget("local"), parts)


def on_cluster(monkeypatch: pytest.MonkeyPatch, **profile: Any) -> SubmitTarget:
    """Return a SLURM cluster that answers no question."""
    monkeypatch.setattr(SlurmBackend, "check", lambda *_: None)
    return SubmitTarget("slurm", Profile.model_validate({**PROFILE, "gpus": 0, **profile}), "dev")


def test_a_task_that_is_told_to_stop_within_a_track_goes_on_to_the_same_corpus(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_of_part, "MOVE_SECONDS", 0.0)
    (part,) = tasks_of(spec, tmp_path / "out", 1).parts
    stop = StopFlag()
    moved = work_of_part.PartProgress.pulse

    def pulse(self: work_of_part.PartProgress) -> None:
        stop.reason = "SIGTERM"
        moved(self)

    monkeypatch.setattr(work_of_part.PartProgress, "pulse", pulse)
    assert work_on(part.order, stop) == "preempted"
    assert not list((tmp_path / "out/.work/tracks").glob("*"))
    monkeypatch.setattr(work_of_part.PartProgress, "pulse", moved)
    assert work_on(part.order, StopFlag()) == "finished"
    assert read_progress(part.folder).step >= 8
    whole = build_corpus(spec, tmp_path / "whole", workers=1)
    assert load_manifest(tmp_path / "out").fingerprint == whole.fingerprint


def test_the_last_part_to_live_finishes_the_corpus_and_the_others_find_it(
    spec: BuildSpec, tmp_path: Path
) -> None:
    tasks = tasks_of(spec, tmp_path / "out")
    for part in reversed(tasks.parts):
        assert work_on(part.order, StopFlag()) == "finished"
        assert tasks.build.is_finished
    assert {one.state for one in tasks.states()} == {PartState.DONE}
    forget_tasks(tasks.build)
    assert not tasks.build.work.exists()


def test_a_corpus_that_was_removed_is_built_again(spec: BuildSpec, tmp_path: Path) -> None:
    tasks = tasks_of(spec, tmp_path / "out")
    for part in tasks.parts:
        work_on(part.order, StopFlag())
    (tmp_path / "out/manifest.json").unlink()
    again = tasks_of(spec, tmp_path / "out", None)
    assert [part.series_id for part in again.parts] == [part.series_id for part in tasks.parts]
    with again.backend:
        assert again.run(lambda _: None)
    assert tasks.build.is_finished


def test_another_specification_is_refused_before_anything_is_submitted(
    spec: BuildSpec, tmp_path: Path
) -> None:
    class Stop(Progress):
        def advance(self, seconds: float = 0.0) -> None:
            if seconds:  # a track has been read
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus(spec, tmp_path / "out", workers=1, progress=Stop())
    assert tasks_of(spec, tmp_path / "out").parts
    with pytest.raises(
        InputError, match=r"unfinished build from another specification \(spec\.seed: 0 before"
    ):
        tasks_of(spec.model_copy(update={"seed": 1}), tmp_path / "out")


def test_parts_for_rvq_take_cores_alone_and_those_of_a_codec_on_gpus_one_gpu_and_its_cores(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = open_tasks(spec, tmp_path / "a", "cpu", on_cluster(monkeypatch, **GPUS), 4)
    assert [(part.on_gpu, part.threads, part.ranks) for part in tasks.parts] == [(False, 1, 1)] * 4
    neural = BuildSpec.model_validate(
        {
            **spec.model_dump(include={"source", "audio", "segment_seconds", "valid"}),
            "codec": "encodec",
            "codec_model": str(write_model("encodec", tmp_path / "model")),
            "codebooks": 2,
        }
    )
    tasks = open_tasks(neural, tmp_path / "b", "cuda", on_cluster(monkeypatch, **GPUS), None)
    assert [(part.on_gpu, part.threads) for part in tasks.parts] == [(True, 4)] * 4
    with pytest.raises(InputError, match="--device cuda: dev has no GPUs"):
        open_tasks(neural, tmp_path / "c", "cuda", on_cluster(monkeypatch), None)
    with pytest.raises(InputError, match="--device cuda:1: other machines compute"):
        open_tasks(neural, tmp_path / "c", "cuda:1", on_cluster(monkeypatch, **GPUS), None)
    assert not list(tmp_path.glob("[abc]"))
