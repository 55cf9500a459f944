"""Corpora built by jobs of a real SLURM that are killed and preempted, and by Ray Data in one of them."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from harness.corpora import build as tasks
from harness.plan.cluster import Cluster
from ssmttm.corpus.build import build_corpus
from ssmttm.corpus.manifest import load_manifest, verify_corpus
from ssmttm.corpus.progress import Progress
from ssmttm.corpus.spec import BuildSpec
from tests.cluster.slurm_study import Make, SlurmStudy
from tests.ssmttm.neural import RATE, noise, write_model
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

SIZES = {"codebooks": 1, "codebook_size": 16, "segment_seconds": 2.0, "valid": 0.25}
WORDS = ("--codebooks", "1", "--codebook-size", "16", "--segment-seconds", "2", "--valid", "0.25")


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Forty recordings of a minute and more, and captions for them."""
    import soundfile

    folder = tmp_path / "recordings"
    folder.mkdir()
    signal = noise(1, 100 * 16000)[0]
    for number in range(40):
        soundfile.write(folder / f"{number:02}.wav", signal[number * 16000 :], 16000)
    rows = (f"{number:02}.wav,Noise number {number}.\n" for number in range(40))
    (folder / "captions.csv").write_text("path,caption\n" + "".join(rows))
    return folder


class Building:
    """A corpus that is built by jobs."""

    def __init__(self, study: SlurmStudy, out: Path, *words: object) -> None:
        self.study, self.out = study, out
        self.words = [str(word) for word in ("data", "build", "--out", out, *WORDS, *words)]
        self.jobs = out / ".work/jobs"

    def build(self) -> str:
        """Call the command; returns what it printed."""
        answer = self.study.call_words(*self.words, "--cluster", str(self.study.profile_path))
        assert answer.status == 0, answer.out + answer.err
        return answer.out

    @property
    def records(self) -> int:
        """Number of tracks that have been read."""
        return len(list(self.out.glob(".work/tracks/*.json")))

    def wait_for_records(self, least: int) -> None:
        """Return when some tracks have been read."""
        wait_until(lambda: self.records >= least, at_once=True)

    def processes(self, part: str) -> list[psutil.Process]:
        """Return the processes that work on a part."""
        mark = str(self.jobs / "parts" / part)
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if "harness.train.part" in (line := process.info["cmdline"] or [])
            and any(mark in word for word in line)
        ]


def test_killed_and_preempted_parts_make_the_corpus_of_one_process_and_so_does_ray_data(
    make: Make, recordings: Path, tmp_path: Path
) -> None:
    folder = BuildSpec.model_validate({"source": "folder", "audio": recordings, **SIZES})
    bach = BuildSpec.model_validate({"source": "bach", "limit": 30, **SIZES})
    study = make()
    of_folder = ("--source", "folder", "--audio", recordings)
    builds = {
        "folder": Building(study, tmp_path / "folder", *of_folder, "--on", "slurm", "--parts", 4),
        "bach": Building(study, tmp_path / "bach", "--limit", 30, "--on", "slurm", "--parts", 4),
    }
    # SLURM would fill one node of eight cores first.
    words = ("--partition=low", "--nodelist=n1", "--cpus-per-task=6", "--output=/dev/null", "--parsable")
    blocker = study.slurm("sbatch", *words, "--wrap", "sleep 600").strip()
    wait_until(lambda: f"{blocker} RUNNING" in study.queue())
    for build in builds.values():
        assert re.search(r"4 tasks submitted to dev: SLURM job \d+", said := build.build()), said
    jobs = study.queue()
    assert len(jobs) == 9
    for job in jobs:  # frames for rvq are made on cores, whatever GPUs the nodes have
        assert "gres/gpu" not in study.asked(job.split()[0])
    killed, preempted = "part-0-of-4", "part-1-of-4"
    for build in builds.values():
        build.wait_for_records(2)
        wait_until(lambda: build.processes(killed), at_once=True)  # noqa: B023
        for process in build.processes(killed):
            process.kill()
        said = build.build()
        assert re.search(r"part-2-of-4: (running|queued|done)", said), said
        assert "submitted" not in said
        other = study.call_words(*build.words, "--seed", "1", "--cluster", str(study.profile_path))
        assert other.status == 2
        assert "with other options" in other.err or "another specification" in other.err, other.err
        asked = re.search(rf"{preempted}: \w+.*\(job (\d+_1)\)", said)
        assert asked is not None, said
        study.slurm("scontrol", "requeue", asked[1])
    assert len(study.queue()) <= len(jobs)
    for build in builds.values():
        wait_until((build.out / "manifest.json").exists)
    study.slurm("scancel", blocker)
    nodes = {line for build in builds.values() for line in started_on(build)}
    assert nodes == {"n1", "n2"}

    ray = Building(study, tmp_path / "ray", *of_folder, "--on", "ray", "--nodes", 2, "--parts", 4)
    assert "1 task submitted to dev: SLURM job" in ray.build()
    ray.wait_for_records(4)
    readers = [p for p in psutil.process_iter(["cmdline"]) if "ray::Map" in " ".join(p.info["cmdline"] or [])]
    if readers:  # else it has just ended
        readers[0].kill()
    wait_until((ray.out / "manifest.json").exists)
    study.wait_until_over()

    expected = {
        name: build_corpus(spec, tmp_path / f"{name}-one", workers=1).fingerprint
        for name, spec in (("folder", folder), ("bach", bach))
    }
    for name, build in {**builds, "ray": ray}.items():
        manifest = load_manifest(build.out)
        verify_corpus(build.out, manifest)
        assert manifest.fingerprint == expected["bach" if name == "bach" else "folder"], name
        assert f"fingerprint {manifest.fingerprint[:12]}" in build.build()
        assert not (build.out / ".work").exists()


def test_ray_data_decodes_and_encodes_to_the_corpus_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import soundfile

    (tmp_path / "music").mkdir()
    for number in range(6):
        audio = noise(1, (2 + number) * RATE + 7, seed=number)[0]
        soundfile.write(tmp_path / f"music/{number}.wav", audio, RATE, subtype="FLOAT")
    (tmp_path / "music/6.wav").write_bytes(b"no sound")
    rows = (f"{number}.wav,Noise {number}.\n" for number in range(7))
    (tmp_path / "music/captions.csv").write_text("path,caption\n" + "".join(rows))
    model = {
        "codec": "encodec",
        "codebooks": 2,
        "codec_model": str(write_model("encodec", tmp_path / "model")),
    }
    cut = {"segment_seconds": 0.3, "valid": 0.25}
    spec = BuildSpec.model_validate({"source": "folder", "audio": tmp_path / "music", **model, **cut})
    expected = build_corpus(spec, tmp_path / "one", workers=1)
    monkeypatch.setattr(tasks, "this_machine", lambda: Cluster("here", 1, 0, 2, 4.0))
    manifest = tasks.build_by_ray_here(spec, tmp_path / "ray", "cpu", Progress())
    assert manifest.fingerprint == expected.fingerprint
    assert [one.track for one in manifest.skipped] == ["6.wav"]
    assert manifest.skipped == expected.skipped


def started_on(build: Building) -> set[str]:
    """Return the nodes on which the jobs of a build were started, by their logs."""
    texts = [path.read_text() for path in build.jobs.glob("logs/slurm/*/*.out")]
    return {node for text in texts for node in re.findall(r"ssmscale: start \d+ on (\S+)", text)}
