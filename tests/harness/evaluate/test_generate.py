"""`ssmscale generate`: a finished run's music as sound files, and what is said where there can be none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from harness.common.disk import write_atomically
from harness.evaluate.generate import frames_of, write_pieces
from harness.evaluate.model import Trained, load_trained
from harness.record.registry import ResolvedStudy
from harness.record.root import Root, read_launch, read_run, write_launch
from ssmttm.errors import InputError
from ssmttm.generation import Sampling
from ssmttm.model.architecture import Architecture
from tests.conftest import Command, files_below
from tests.corpora import tone_codec, write_tiny_corpus

MAJOR, MINOR = "A made piece in C major, number 1.", "Slow strings in D minor, very quiet at first."


ASKED = ("--prompt", "a", "--out", "x.wav")


@pytest.fixture(scope="module")
def run_id(there: Path) -> str:
    """Of the longer of the two runs."""
    runs = [read_run(path) for path in (there / "runs").iterdir()]
    return max(runs, key=lambda run: run.iterations).run_id


@pytest.fixture(scope="module")
def trained(there: Path, run_id: str) -> Trained:
    return load_trained(Root(there), run_id)


@pytest.fixture
def moved(there: Path, tmp_path: Path, run_id: str) -> Root:
    """The same ROOT as the test's own, to be changed."""
    shutil.copytree(there, tmp_path / "moved")
    return Root(tmp_path / "moved")


@pytest.fixture
def generate(ssmscale: Command, there: Path, run_id: str) -> Command:
    """`ssmscale generate` with the trained run."""
    return lambda *words: ssmscale("generate", run_id, "--root", there, *words)


def tokens(trained: Trained, prompts: list[str], seed: int = 0, **sampling: Any) -> np.ndarray:
    from ssmttm import generation

    seeds = range(seed, seed + len(prompts))
    return generation.generate(trained.model, trained.read(prompts), 50, Sampling(**sampling), seeds).numpy()


def test_a_trained_run_writes_audio_of_the_length_of_its_corpus_clips(
    ssmscale: Command, there: Path, run_id: str
) -> None:
    said = ssmscale("generate", run_id[:8], "--root", there, "--prompt", MAJOR, "--out", "piece.wav")
    assert (said.status, said.err) == (0, "")
    audio, rate = soundfile.read("piece.wav")
    assert (rate, audio.shape) == (16000, (16000,))
    assert np.sqrt(np.mean(audio**2)) > 0.01
    assert np.abs(audio).max() < 1
    assert soundfile.info("piece.wav").subtype == "PCM_16"


def test_beside_a_piece_lies_all_that_makes_it_again(generate: Command, run_id: str) -> None:
    asked = ("--top-k", 40, "--guidance", 1.5, "--seed", 7, "--seconds", 0.5)
    said = generate("--prompt", MAJOR, "--prompt", MINOR, "--out", "out/piece.wav", "--json", *asked)
    pieces = [f"piece-{number}.wav" for number in range(2)]
    assert files_below(Path("out")) == sorted([*pieces, *(f"{piece}.json" for piece in pieces)])
    second = json.loads(Path("out/piece-1.wav.json").read_text())
    assert second["run_id"] == run_id
    assert (second["prompt"], second["seed"], second["frames"]) == (MINOR, 8, 25)
    assert second["sampling"] == {"temperature": 1.0, "top_k": 40, "top_p": None, "guidance": 1.5}
    assert [piece["path"] for piece in said.document["pieces"]] == [f"out/{piece}" for piece in pieces]
    generate("--prompt", MINOR, "--out", "again.wav", *asked, "--seed", 8)
    assert Path("again.wav").read_bytes() == Path("out/piece-1.wav").read_bytes()


def test_a_file_of_prompts_fills_a_folder(ssmscale: Command, there: Path, run_id: str) -> None:
    Path("prompts.txt").write_text(f"{MAJOR}\n\n{MINOR}\n", encoding="utf-8-sig")
    said = ssmscale("generate", there / "runs" / run_id, "--prompts", "prompts.txt", "--out", "pieces")
    assert said.status == 0, said.err
    assert files_below(Path("pieces")) == ["0.wav", "0.wav.json", "1.wav", "1.wav.json"]
    Path("prompts.csv").write_text(f'ytid,caption\na,"{MAJOR}"\nb,"{MINOR}"\n')
    ssmscale("generate", there / "runs" / run_id, "--prompts", "prompts.csv", "--out", "rows", "--seconds", 1)
    for piece in files_below(Path("pieces")):
        assert Path("rows", piece).read_bytes() == Path("pieces", piece).read_bytes()


def test_tokens_follow_caption_and_seed(trained: Trained) -> None:
    first = tokens(trained, [MAJOR])
    assert np.array_equal(first, tokens(trained, [MAJOR]))
    assert not np.array_equal(first, tokens(trained, [MINOR]))
    assert not np.array_equal(first, tokens(trained, [MAJOR], seed=1))
    assert np.array_equal(first[0], tokens(trained, [MAJOR, "A much longer caption than that."])[0])


def test_without_guidance_the_caption_says_nothing(trained: Trained) -> None:
    unguided = tokens(trained, [MAJOR], guidance=0.0)
    assert np.array_equal(unguided, tokens(trained, [MINOR], guidance=0.0))
    assert np.array_equal(unguided, tokens(trained, [""], guidance=1.0))
    assert not np.array_equal(unguided, tokens(trained, [MAJOR], guidance=1.0))


def test_audio_beyond_full_scale_is_brought_down_and_that_is_said(tmp_path: Path, trained: Trained) -> None:
    class Loud:
        facts = trained.codec.facts

        def decode(self, codes: np.ndarray) -> np.ndarray:
            return trained.codec.decode(codes) * 20

    loud = replace(trained)
    loud.__dict__["codec"] = Loud()
    (piece,) = write_pieces(loud, [MAJOR], [tmp_path / "loud.wav"], 50, Sampling(), 0)
    assert piece.scaled_by < 0.5
    audio, _ = soundfile.read(tmp_path / "loud.wav")
    assert np.abs(audio).max() == pytest.approx(0.99, abs=1e-4)


def test_what_lies_beside_a_piece_tells_of_no_other(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "piece.wav"
    list(write_pieces(trained, [MAJOR], [path], 5, Sampling(), 0))
    written = []

    def killed(where: Path, content: str | bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(write_atomically(where, content))

    monkeypatch.setattr("harness.evaluate.generate.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        list(write_pieces(trained, [MINOR], [path], 5, Sampling(), 0))
    assert files_below(tmp_path) == ["piece.wav"]


def test_a_piece_longer_than_training_is_warned_of_and_of_a_transformer_refused(
    generate: Command, trained: Trained
) -> None:
    said = generate("--prompt", MAJOR, "--seconds", 1.5, "--out", "long.wav")
    warning = "warning: longer than the 1 s that the run was trained on; the rest is untested\n"
    assert (said.status, said.err) == (0, warning)
    assert soundfile.info("long.wav").duration == 1.5
    attention = trained.run.model.model_copy(update={"architecture": Architecture.CROSS_TRANSFORMER})
    other = replace(trained, run=trained.run.model_copy(update={"model": attention}))
    assert frames_of(other, 1.0) == 50
    with pytest.raises(InputError, match=r"--seconds 1.5: a cross_transformer .* choose up to 1 s"):
        frames_of(other, 1.5)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--out", "x.wav"], "give either --prompt TEXT"),
        (["--prompt", "a", "--prompts", "empty.txt", "--out", "x.wav"], "give either --prompt TEXT"),
        (["--prompts", "empty.txt", "--out", "x.wav"], "empty.txt: holds no caption"),
        (["--prompts", "gone.txt", "--out", "x.wav"], "gone.txt: no such captions file"),
        (["--prompt", "a", "--out", "x.mp3"], "--out x.mp3: sound is written as F.wav"),
        ([*ASKED, "--temperature", "0"], "temperature is 0.0"),
        ([*ASKED, "--top-k", "-1"], "top_k is -1"),
        ([*ASKED, "--top-p", "2"], "top_p is 2.0"),
        ([*ASKED, "--guidance", "nan"], "guidance is nan"),
        ([*ASKED, "--seconds", "0.001"], "--seconds 0.001: choose a length of 0.02 s"),
        ([*ASKED, "--device", "cuda:99"], "--device cuda:99: there is none here; torch can use cpu"),
        ([*ASKED, "--device", "meta"], "--device meta: there is none here"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_asked_is_one_sentence_and_writes_nothing(
    generate: Command, arguments: list[str], problem: str
) -> None:
    Path("empty.txt").write_text("\n")
    said = generate(*arguments)
    assert said.status == 2
    assert said.err.startswith(f"error: {problem}")
    assert said.err.count("\n") == 1
    assert files_below(Path()) == ["empty.txt"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("0123456789ab", "begins the id of 0 runs under"),
        ("nonsense", "neither a run's directory nor a run id"),
        ("", "neither a run's directory nor a run id"),
    ],
    ids=["unknown", "no_id", "empty"],
)
def test_a_run_that_is_not_there_is_named(there: Path, name: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load_trained(Root(there), name)


def test_a_run_that_nothing_has_trained_cannot_be_opened(resolved: ResolvedStudy) -> None:
    run_id = resolved.points[0].run.run_id
    with pytest.raises(InputError, match=f"run {run_id}: has not finished, nothing has trained it yet"):
        load_trained(resolved.root, run_id)


def test_weights_that_are_gone_or_damaged_are_named(moved: Root, run_id: str) -> None:
    weights = moved.run(run_id) / "checkpoints" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{weights}: not the weights of run {run_id}"):
        load_trained(moved, run_id)
    weights.unlink()
    with pytest.raises(
        InputError, match=f"{weights}: run {run_id} has finished, but its weights are not here"
    ):
        load_trained(moved, run_id)


def test_a_corpus_that_is_gone_or_another_is_named(moved: Root, run_id: str, tmp_path: Path) -> None:
    series_id = read_run(moved.run(run_id)).series_id
    launch = read_launch(moved, series_id)
    write_launch(moved, series_id, launch.model_copy(update={"corpus": tmp_path / "gone"}))
    with pytest.raises(InputError, match="gone: no corpus here"):
        load_trained(moved, run_id)
    write_tiny_corpus(tmp_path / "other", seed=1)
    write_launch(moved, series_id, launch.model_copy(update={"corpus": tmp_path / "other"}))
    with pytest.raises(
        InputError, match=f"other: is not the corpus of run {run_id}: its fingerprint differs"
    ):
        load_trained(moved, run_id)


def test_another_codec_in_the_corpus_is_not_listened_through(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.corpus, tmp_path / "corpus")
    tone_codec(2, 64, bands=20).save(tmp_path / "corpus" / "codec")
    with pytest.raises(InputError, match="is not the codec that made the corpus"):
        _ = replace(trained, corpus=tmp_path / "corpus").codec
