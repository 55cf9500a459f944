"""`ssmscale data`: a folder of recordings becomes a corpus, and wrong options are refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Answer, Command, flip_a_byte
from tests.harness.fuzzing import refused


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    import soundfile

    folder = tmp_path / "recordings"
    folder.mkdir()
    rate = 16000
    for number in range(4):
        seconds = np.arange(rate * 6) / rate
        notes = 220 * 2 ** (((seconds * 2).astype(int) * (number + 3) % 12) / 12)
        tone = 0.3 * np.sin(2 * np.pi * np.cumsum(notes) / rate)
        soundfile.write(folder / f"piece-{number}.flac", tone.astype(np.float32), rate)
    lines = (f"piece-{number}.flac,A tone that climbs by {number + 3}\n" for number in range(4))
    (tmp_path / "captions.csv").write_text("path,caption\n" + "".join(lines))
    return folder


BUILD = (
    "data build --source folder --out corpus --segment-seconds 2 --valid 0.25 --codebooks 2 --codebook-size 16 "
    "--licence CC0-1.0 --workers 1"
)


def build(ssmscale: Command, recordings: Path, *more: object) -> Answer:
    captions = recordings.parent / "captions.csv"
    return ssmscale(*BUILD.split(), "--audio", recordings, "--captions", captions, *more)


def inspected(ssmscale: Command) -> Any:
    return ssmscale("data", "inspect", "corpus", "--json").document


def test_recordings_become_a_corpus_that_is_left_alone_when_built_again_and_checked_when_inspected(
    ssmscale: Command, recordings: Path
) -> None:
    first = build(ssmscale, recordings)
    assert first.status == 0, first.err
    splits = inspected(ssmscale)["splits"]
    assert (splits["train"]["tracks"], splits["valid"]["tracks"]) == (3, 1)
    before = {path: path.stat().st_mtime_ns for path in Path("corpus").rglob("*")}
    assert build(ssmscale, recordings).status == 0
    assert refused(build(ssmscale, recordings, "--seed", 5), "seed")
    assert {path: path.stat().st_mtime_ns for path in Path("corpus").rglob("*")} == before
    shard = next(Path("corpus/shards").glob("train-*.npy"))
    flip_a_byte(shard)
    assert refused(ssmscale("data", "inspect", "corpus"), shard.name)


def test_rows_of_captions_that_are_set_aside_are_counted_by_reason(
    ssmscale: Command, recordings: Path
) -> None:
    with (recordings.parent / "captions.csv").open("a") as file:
        file.write("".join(f"gone-{number}.flac,A tone\n" for number in range(5)) + "piece-0.flac,\n")
    for answer in (build(ssmscale, recordings), ssmscale("data", "inspect", "corpus")):
        assert answer.status == 0, answer.err
        assert "set aside: 6 rows of captions" in answer.out
        assert "captions.csv, line 6 ('gone-0.flac'), line 7" in answer.out
        assert "and 2 more: names a file that is not in the audio directory" in answer.out
        assert "captions.csv, line 11: has no caption" in answer.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", "radio"], "source"),
        (["--source", "folder"], "audio"),
        (["--source", "folder", "--audio", "nowhere"], "nowhere"),
        (["--codebooks", "0"], "codebooks"),
        (["--valid", "2"], "valid"),
        (["--codec", "opus"], "codec: 'opus': input should be 'rvq', 'encodec' or 'dac'"),
        (["--codec", "dac"], "put its config.json and model.safetensors into a folder"),
        (
            ["--codec", "encodec", "--codec-model", "no-owner/no-model"],
            "codec model 'no-owner/no-model' is neither",
        ),
        (["--codec", "encodec", "--codec-model", "."], "lacks config.json or *.safetensors"),
        (["--codec", "dac", "--codebook-size", "64"], "codebook_size is for codec rvq"),
        (["--codec-model", "descript/dac_44khz"], "codec_model is for codecs encodec and dac"),
        (["--device", "cuda"], "--device cuda: codec rvq computes on the cpu"),
        (
            ["--codec", "dac", "--device", "cuda:99"],
            "--device cuda:99: no such device here; torch can use cpu",
        ),
        (["--parts", "2"], "--parts 2: applies to tasks; say with --on where they run"),
        (["--cluster", "h100x8"], "--cluster h100x8: applies to tasks"),
        (["--ray-address", "http://h:1"], "--ray-address http://h:1: applies to tasks"),
        (["--nodes", "2"], "--nodes 2: applies to tasks"),
        (["--no-snapshot"], "--snapshot False: applies to tasks"),
        (["--on", "moon"], "--on moon: no such backend; choose one of local, slurm, ray or auto"),
        (["--on", "local", "--workers", "2"], "--workers 2: is for a build in one process"),
        (["--on", "local", "--nodes", "2"], "--nodes 2: applies to packed"),
        (["--on", "slurm"], "--on slurm: name the cluster with --cluster"),
        (["--on", "slurm", "--cluster", "nowhere"], "nowhere"),
        (["--on", "ray", "--parts", "2"], "--parts 2: a Ray of this machine takes all its cores"),
        (["--on", "local", "--source", "folder", "--audio", "nowhere"], "nowhere"),
        (["--on", "auto", "--device", "cuda"], "--device cuda: codec rvq computes on the cpu"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(
    ssmscale: Command, words: list[str], said: str
) -> None:
    assert refused(ssmscale("data", "build", "--out", "corpus", *words), said)
    assert not Path("corpus").exists()


def test_tasks_of_this_machine_build_the_corpus_of_one_process(ssmscale: Command, recordings: Path) -> None:
    whole = build(ssmscale, recordings)
    words = tuple(BUILD.replace("corpus", "tasks").removesuffix(" --workers 1").split())
    given = ("--audio", recordings, "--captions", recordings.parent / "captions.csv", "--on", "local")
    failed = ssmscale(*words, *given, "--segment-seconds", 50, "--parts", 2)
    assert failed.status == 1
    assert "part-0-of-2: failed: segment_seconds is 50, but the longest track has only 6.0 s" in failed.out
    built = ssmscale(*words, *given, "--parts", 2)
    assert built.status == 0, built.err
    shown = [line for line in built.out.splitlines() if not line.startswith("[")]
    assert shown == [line.replace("corpus: ", "tasks: ") for line in whole.out.splitlines()[-len(shown) :]]
    assert not Path("tasks/.work").exists()
    before = {path: path.stat().st_mtime_ns for path in Path("tasks").rglob("*")}
    assert ssmscale(*words, *given, "--parts", 3).out.splitlines() == shown
    assert {path: path.stat().st_mtime_ns for path in Path("tasks").rglob("*")} == before


def test_what_was_left_out_is_named_with_its_reason(ssmscale: Command, recordings: Path) -> None:
    (recordings / "piece-0.flac").write_bytes(b"not music")
    (recordings / "loose.wav").touch()
    built = build(ssmscale, recordings)
    assert "left out: 2 tracks" in built.out
    assert "no caption: 1 track: loose.wav" in built.out
    assert "unreadable audio: 1 track: piece-0.flac (the file holds no sound)" in built.out
    shown = ssmscale("data", "inspect", "corpus").out
    assert "no caption: 1 track: loose.wav" in shown
    assert "2 codebooks of 16 entries" in shown
    assert inspected(ssmscale)["skipped_reasons"]["no caption"] == ["loose.wav"]


def test_reasons_that_differ_in_their_details_are_one_line(ssmscale: Command, recordings: Path) -> None:
    for number in range(2):
        path = recordings / f"piece-{number}.flac"
        path.write_bytes(path.read_bytes()[: 20_000 + 9_000 * number])
    out = build(ssmscale, recordings).out
    (line,) = [line for line in out.splitlines() if "damaged" in line]
    assert line.startswith("  damaged: 2 tracks: piece-0.flac (its file ends after ")
    assert ", piece-1.flac (its file ends after " in line
