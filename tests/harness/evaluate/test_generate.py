"""`ssmscale generate` writes a finished run's music as sound files, or names the mistake."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

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
COMPLETE = ("--prompt", "a", "--out", "x.wav")


@pytest.fixture(scope="module")
def run_id(there: Path) -> str:
    """The id of the longer of the two runs."""
    runs = [read_run(path) for path in (there / "runs").iterdir()]
    return max(runs, key=lambda run: run.iterations).run_id


@pytest.fixture(scope="module")
def trained(there: Path, run_id: str) -> Trained:
    return load_trained(Root(there), run_id)


@pytest.fixture
def moved(there: Path, tmp_path: Path, run_id: str) -> Root:
    """A copy of the ROOT; change it at will."""
    shutil.copytree(there, tmp_path / "moved")
    return Root(tmp_path / "moved")


@pytest.fixture
def generate(ssmscale: Command, there: Path, run_id: str) -> Command:
    """`ssmscale generate` with the trained run."""
    return lambda *words: ssmscale("generate", run_id, "--root", there, *words)


def test_a_trained_run_writes_audio_of_the_length_of_its_corpus_clips(
    ssmscale: Command, there: Path, run_id: str
) -> None:
    answer = ssmscale("generate", run_id[:8], "--root", there, "--prompt", MAJOR, "--out", "piece.wav")
    assert (answer.status, answer.err) == (0, "")
    audio, rate = soundfile.read("piece.wav")
    assert (rate, audio.shape) == (16000, (16000,))
    assert np.sqrt(np.mean(audio**2)) > 0.01
    assert np.abs(audio).max() < 1
    assert soundfile.info("piece.wav").subtype == "PCM_16"


def test_the_json_file_of_a_piece_holds_everything_that_makes_it_again(
    generate: Command, run_id: str
) -> None:
    asked = ("--top-k", 40, "--guidance", 1.5, "--seed", 7, "--seconds", 0.5)
    answer = generate("--prompt", MAJOR, "--prompt", MINOR, "--out", "out/piece.wav", "--json", *asked)
    pieces = [f"piece-{number}.wav" for number in range(2)]
    assert files_below(Path("out")) == sorted([*pieces, *(f"{piece}.json" for piece in pieces)])
    second = json.loads(Path("out/piece-1.wav.json").read_text())
    assert second["run_id"] == run_id
    assert (second["prompt"], second["seed"], second["frames"]) == (MINOR, 8, 25)
    assert second["sampling"] == {"temperature": 1.0, "top_k": 40, "top_p": None, "guidance": 1.5}
    assert [piece["path"] for piece in answer.document["pieces"]] == [f"out/{piece}" for piece in pieces]
    generate("--prompt", MINOR, "--out", "again.wav", *asked, "--seed", 8)
    assert Path("again.wav").read_bytes() == Path("out/piece-1.wav").read_bytes()


def test_a_file_of_prompts_fills_a_folder(ssmscale: Command, there: Path, run_id: str) -> None:
    Path("prompts.txt").write_text(f"{MAJOR}\n\n{MINOR}\n", encoding="utf-8-sig")
    answer = ssmscale("generate", there / "runs" / run_id, "--prompts", "prompts.txt", "--out", "pieces")
    assert answer.status == 0, answer.err
    assert files_below(Path("pieces")) == ["0.wav", "0.wav.json", "1.wav", "1.wav.json"]
    Path("prompts.csv").write_text(f'ytid,caption\na,"{MAJOR}"\nb,"{MINOR}"\n')
    ssmscale("generate", there / "runs" / run_id, "--prompts", "prompts.csv", "--out", "rows", "--seconds", 1)
    for piece in files_below(Path("pieces")):
        assert Path("rows", piece).read_bytes() == Path("pieces", piece).read_bytes()


def test_audio_beyond_full_scale_is_scaled_and_reported(tmp_path: Path, trained: Trained) -> None:
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


def test_a_kill_between_two_files_leaves_no_sound_with_the_json_of_another(
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
    answer = generate("--prompt", MAJOR, "--seconds", 1.5, "--out", "long.wav")
    assert answer.status == 0
    assert answer.err.startswith("warning: longer than the 1 s that the run was trained on")
    assert soundfile.info("long.wav").duration == 1.5
    attention = trained.run.model.model_copy(update={"architecture": Architecture("cross_transformer")})
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
        (["--prompt", "a", "--out", "x.mp3"], "--out x.mp3: name a .wav file"),
        ([*COMPLETE, "--temperature", "0"], "temperature is 0.0"),
        ([*COMPLETE, "--seconds", "0.001"], "--seconds 0.001: choose a length of 0.02 s"),
        ([*COMPLETE, "--device", "cuda:99"], "--device cuda:99: no such device here; torch can use cpu"),
        ([*COMPLETE, "--device", "meta"], "--device meta: no such device here"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "-".join(value),
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    generate: Command, arguments: list[str], problem: str
) -> None:
    Path("empty.txt").write_text("\n")
    answer = generate(*arguments)
    assert answer.status == 2
    assert answer.err.startswith(f"error: {problem}")
    assert answer.err.count("\n") == 1
    assert files_below(Path()) == ["empty.txt"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("0123456789ab", "no run ids under .* start with '0123456789ab'"),
        ("nonsense", "'nonsense' is neither a run's directory nor a run id"),
        ("", "'' is neither a run's directory nor a run id"),
    ],
)
def test_a_missing_run_is_named(there: Path, name: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load_trained(Root(there), name)


def test_a_run_that_has_not_started_cannot_be_loaded(resolved: ResolvedStudy) -> None:
    run_id = resolved.points[0].run.run_id
    with pytest.raises(InputError, match=f"run {run_id} has not finished .it has not started.;"):
        load_trained(resolved.root, run_id)


def test_missing_or_damaged_weights_are_named(moved: Root, run_id: str) -> None:
    weights = moved.run(run_id) / "checkpoints" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{weights}: not the weights of run {run_id}"):
        load_trained(moved, run_id)
    weights.unlink()
    with pytest.raises(InputError, match=f"{weights}: the weights of run {run_id} are missing"):
        load_trained(moved, run_id)


def test_a_missing_corpus_or_another_one_is_named(moved: Root, run_id: str, tmp_path: Path) -> None:
    series_id = read_run(moved.run(run_id)).series_id
    launch = read_launch(moved, series_id)
    write_launch(moved, series_id, launch.model_copy(update={"corpus": tmp_path / "gone"}))
    with pytest.raises(InputError, match="gone: no corpus here"):
        load_trained(moved, run_id)
    write_tiny_corpus(tmp_path / "other", seed=1)
    write_launch(moved, series_id, launch.model_copy(update={"corpus": tmp_path / "other"}))
    with pytest.raises(InputError, match=f"other: not the corpus of run {run_id}: its fingerprint differs"):
        load_trained(moved, run_id)


def test_another_codec_in_the_corpus_is_refused(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.launch.corpus, tmp_path / "corpus")
    launch = trained.launch.model_copy(update={"corpus": tmp_path / "corpus"})
    tone_codec(2, 64, bands=20).save(tmp_path / "corpus" / "codec")
    with pytest.raises(InputError, match="not the codec that made the corpus"):
        _ = replace(trained, launch=launch).codec
