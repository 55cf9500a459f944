"""Builds that share a corpus's folder: whatever becomes of the workers, the corpus is that of one process."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ssmttm.codec.neural import NeuralCodec
from ssmttm.corpus import parts
from ssmttm.corpus.bach import BachSource
from ssmttm.corpus.build import OpenBuild, build_corpus, build_part, local_workers
from ssmttm.corpus.claim import claim
from ssmttm.corpus.manifest import load_manifest, verify_corpus
from ssmttm.corpus.parts import PartLocks, Share, divide, estimated_seconds
from ssmttm.corpus.progress import Progress
from ssmttm.corpus.source import TrackRef
from ssmttm.corpus.spec import BuildSpec
from ssmttm.corpus.workers import EncoderServer
from ssmttm.errors import InputError
from tests.ssmttm.neural import HOP, RATE, noise
from tests.waiting import wait_until

PART = """
import sys
from pathlib import Path
from ssmttm.corpus.build import OpenBuild, build_part, local_workers
from ssmttm.corpus.parts import Share
from ssmttm.corpus.spec import BuildSpec
if __name__ == "__main__":
    spec, out, part, of = sys.argv[1:]
    build = OpenBuild(BuildSpec.model_validate_json(spec), Path(out))
    build_part(build, Share(int(part), int(of)), local_workers(1))
"""
SIZES = {"codebooks": 1, "codebook_size": 16, "segment_seconds": 2.0, "valid": 0.25}


@pytest.fixture(scope="module")
def folder_spec(tmp_path_factory: pytest.TempPathFactory) -> BuildSpec:
    """Twelve recordings of 4 to 15 s."""
    root = tmp_path_factory.mktemp("music")
    for number in range(12):
        soundfile.write(root / f"{number:02}.wav", noise(1, (4 + number) * 16000, seed=number)[0], 16000)
    (root / "captions.csv").write_text(
        "path,caption\n" + "".join(f"{number:02}.wav,Noise number {number}.\n" for number in range(12))
    )
    return BuildSpec.model_validate({"source": "folder", "audio": root, **SIZES})


@pytest.fixture
def whole(folder_spec: BuildSpec, tmp_path: Path) -> str:
    """The fingerprint of the folder's corpus, built in one process."""
    return build_corpus(folder_spec, tmp_path / "whole", workers=1).fingerprint


def start(spec: BuildSpec, out: Path, part: int, of: int = 4) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PART, spec.model_dump_json(), str(out), str(part), str(of)]
    )


def records(out: Path) -> int:
    return len(list(out.glob(".work/tracks/*.json")))


def sources(folder_spec: BuildSpec, bach_spec: BuildSpec) -> dict[str, BuildSpec]:
    return {"folder": folder_spec, "bach": bach_spec}


@pytest.mark.parametrize("source", ["folder", "bach"])
def test_four_parts_of_which_workers_are_killed_make_the_corpus_of_one_process(
    source: str, folder_spec: BuildSpec, bach_spec: BuildSpec, bach_corpus: Path, tmp_path: Path
) -> None:
    spec = sources(folder_spec, bach_spec)[source]
    expected = (
        load_manifest(bach_corpus) if source == "bach" else build_corpus(spec, tmp_path / "one", workers=1)
    )
    out, draw = tmp_path / "out", random.Random(7)
    workers = [start(spec, out, part) for part in range(4)]
    for part in draw.sample(range(4), 2):
        seen = records(out)
        wait_until(lambda: records(out) > seen or (out / "manifest.json").exists())  # noqa: B023
        time.sleep(draw.uniform(0, 0.2))  # no condition: any instant will do
        workers[part].kill()
        workers[part].wait()
        if draw.random() < 0.5:
            workers[part] = start(spec, out, part)
    assert all(worker.wait(120) in {0, -9} for worker in workers)
    manifest = load_manifest(out)
    verify_corpus(out, manifest)
    assert manifest.fingerprint == expected.fingerprint
    assert manifest.skipped == expected.skipped
    assert not (out / ".work").exists()
    assert not list(out.glob("**/.*.tmp"))


def test_one_worker_finishes_the_parts_that_no_living_worker_reads(
    folder_spec: BuildSpec, whole: str, tmp_path: Path
) -> None:
    manifest = build_part(OpenBuild(folder_spec, tmp_path / "out"), Share(2, 4), local_workers(1))
    assert manifest is not None
    assert manifest.fingerprint == whole


def test_a_worker_waits_for_a_reading_one_only_for_a_while(
    folder_spec: BuildSpec, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "WAIT_SECONDS", 0.1)
    out = tmp_path / "out"
    with PartLocks(out / ".work", 2) as other:
        assert other.take(1)
        claim(OpenBuild(folder_spec, out).full_recipe, out, [])
        assert build_part(OpenBuild(folder_spec, out), Share(0, 2), local_workers(1)) is None
        assert 0 < records(out) < 12
    manifest = build_part(OpenBuild(folder_spec, out), Share(1, 2), local_workers(1))
    assert manifest is not None
    assert manifest.fingerprint == whole


def test_a_living_part_refuses_builds_of_other_parts_and_of_other_specifications(
    folder_spec: BuildSpec, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    class BuildMeanwhile(Progress):
        def stage(self, name: str, total: int, done: int) -> None:
            if name != "read tracks":
                return
            for of, spec, said in (
                (1, folder_spec, "another build is writing"),
                (3, folder_spec, "another build is writing"),
                (4, folder_spec.model_copy(update={"seed": 1}), "another build is writing"),
            ):
                with pytest.raises(InputError, match=said):
                    build_part(OpenBuild(spec, out), Share(0, of), local_workers(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_part(OpenBuild(folder_spec, out), Share(1, 4), local_workers(1), BuildMeanwhile())


def test_the_jobs_of_a_build_outlive_its_other_work(folder_spec: BuildSpec, tmp_path: Path) -> None:
    journal = tmp_path / "out/.work/jobs/parts/p0/journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.touch()
    build_corpus(folder_spec, tmp_path / "out", workers=1)
    assert [path.name for path in (tmp_path / "out/.work").iterdir()] == ["jobs"]
    assert journal.exists()


def test_a_listener_stops_a_build_within_a_track(folder_spec: BuildSpec, whole: str, tmp_path: Path) -> None:
    class Stop(Progress):
        left = 3

        def pulse(self) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build_corpus(folder_spec, out, workers=1, progress=Stop())
    assert records(out) < 3
    assert build_corpus(folder_spec, out, workers=1).fingerprint == whole


def test_parts_are_about_equal_and_keep_the_versions_of_a_score_together() -> None:
    spec = BuildSpec(source="bach", versions=3, transpose=True)
    refs, _ = BachSource(spec).tracks()
    divided = divide(refs, 7)
    assert divided == divide(list(reversed(list(reversed(refs)))), 7)
    assert sorted(ref.track for part in divided for ref in part) == sorted(ref.track for ref in refs)
    assert sum(len({ref.piece for ref in part}) for part in divided) == len({ref.piece for ref in refs})
    lengths = [sum(map(estimated_seconds, part)) for part in divided]
    assert max(lengths) < 1.1 * min(lengths)


def test_a_compressed_recording_counts_by_its_length(tmp_path: Path) -> None:
    audio = noise(1, 44100 * 20)[0]
    refs = []
    for name in ("a.wav", "b.wav", "c.mp3", "d.mp3"):
        soundfile.write(tmp_path / name, audio, 44100)
        refs.append(TrackRef(track=name, piece=name, group=name, path=tmp_path / name))
    assert (
        sorted(sorted(ref.path.suffix for ref in part) for part in divide(refs, 2)) == [[".mp3", ".wav"]] * 2
    )
    assert [len(part) for part in divide(refs, 6)].count(0) == 2


def test_a_codec_of_another_process_gives_the_same_codes(models: dict[str, Path]) -> None:
    codec = NeuralCodec.of_model("encodec", str(models["encodec"]), 2)
    batches = [noise(rows, 20 * HOP + 7, seed=rows) for rows in (1, 3, 8)]
    server = EncoderServer(codec, clients=2)
    found: dict[int, list[np.ndarray]] = {}

    def ask(number: int) -> None:
        client = server.client()
        found[number] = [client.encode(batch) for batch in batches]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.close()
    for codes in found.values():
        for batch, mine in zip(batches, codes, strict=True):
            assert np.array_equal(mine, codec.encode(batch))


def test_what_a_codec_of_another_process_raises_is_raised_here(models: dict[str, Path]) -> None:
    server = EncoderServer(NeuralCodec.of_model("encodec", str(models["encodec"]), 2), clients=1)
    with pytest.raises(RuntimeError, match="ValueError"):
        server.client().encode(np.zeros(RATE, np.float32))  # not a batch
    server.close()


def test_the_codes_of_a_clip_do_not_depend_on_the_clips_beside_it(models: dict[str, Path]) -> None:
    codec = NeuralCodec.of_model("encodec", str(models["encodec"]), 2)
    clips = noise(5, 30 * HOP)
    assert np.array_equal(codec.encode(clips), np.concatenate([codec.encode(clip[None]) for clip in clips]))
