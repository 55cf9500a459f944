"""Measures of generated music, by models with random weights whose arithmetic is the real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ssmttm.errors import InputError
from ssmttm.evaluation.clap import Clap
from ssmttm.evaluation.frechet import Moments, frechet_distance
from ssmttm.evaluation.likelihood import likelihood_scores
from ssmttm.evaluation.measure import windows
from ssmttm.evaluation.mel_proxy import MelProxy
from ssmttm.evaluation.row_store import RowStore
from ssmttm.evaluation.tagger import AstTagger, kl_softmax
from tests.ssmttm.judges import write_tiny_ast, write_tiny_clap

RATE = 16000


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `clap` and `ast`; read them, never change them."""
    place = tmp_path_factory.mktemp("judges")
    write_tiny_clap(place / "clap")
    write_tiny_ast(place / "ast")
    return place


@pytest.fixture
def clap(judges: Path, tmp_path: Path) -> Clap:
    return Clap(str(judges / "clap"), tmp_path)


@pytest.fixture
def tagger(judges: Path, tmp_path: Path) -> AstTagger:
    return AstTagger(str(judges / "ast"), tmp_path)


def tones(*hertz: float, seconds: float = 0.8) -> list[np.ndarray]:
    t = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(0).normal(size=len(t)) * 0.01
    return [(0.5 * np.sin(2 * np.pi * f * t) + noise).astype(np.float32) for f in hertz]


@pytest.mark.parametrize(
    ("samples", "lengths"), [(4, [4]), (10, [10]), (14, [10, 9]), (20, [10, 10, 10]), (23, [10, 10, 10, 8])]
)
def test_windows_overlap_by_half_and_cover_the_clip(samples: int, lengths: list[int]) -> None:
    clip = np.arange(samples, dtype=np.float32)
    cut = windows(clip, 10)
    assert [len(one) for one in cut] == lengths
    assert np.array_equal(np.unique(np.concatenate(cut)), clip)


def test_a_clips_embedding_does_not_depend_on_the_other_clips(clap: Clap) -> None:
    clips = [*tones(200, 900), *tones(400, seconds=2.3)]
    together = clap.rows(clips, RATE)["embedding"]
    assert together.shape == (3, 16)
    assert np.allclose(together[:1], clap.rows(clips[:1], RATE)["embedding"], atol=1e-5)
    assert np.allclose(together[2:], clap.rows(clips[2:], RATE)["embedding"], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-4


def test_clap_scores_the_cosine_of_each_clip_and_its_caption(clap: Clap) -> None:
    rows = clap.rows(tones(200, 900), RATE)
    captions = ["a low tone", "a high tone, " + "and a caption too long to be read whole " * 9]
    scores = clap.score(rows, rows, captions)
    distance, score = clap.metrics
    audio, text = rows["embedding"], clap.text(captions)
    cosines = [a @ t / np.linalg.norm(a) / np.linalg.norm(t) for a, t in zip(audio, text, strict=True)]
    assert scores.values[score] == pytest.approx(np.mean(cosines))
    assert scores.values[distance] == pytest.approx(0, abs=1e-9)
    assert any("2 clips for 16 dimensions" in note for note in scores.notes)


def test_a_metric_is_named_after_the_content_of_its_models_files(judges: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(judges / "clap", tmp_path / "moved")
    other = write_tiny_clap(tmp_path / "other", seed=1)
    names = [Clap(str(folder), tmp_path).metrics for folder in (judges / "clap", moved, other)]
    assert names[0] == names[1] != names[2]
    assert [name.split("-")[0] for name in names[0]] == ["fd_clap", "clap_score"]


def test_a_missing_or_wrong_model_is_explained(judges: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--clap 'no/such' .*into a folder and give that folder"):
        Clap("no/such", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"--tagger .* lacks config\.json or \*\.safetensors"):
        AstTagger(str(tmp_path), tmp_path)
    with pytest.raises(InputError, match=r"--tagger .*model_type is 'clap', not 'audio-spectrogram-transf"):
        AstTagger(str(judges / "clap"), tmp_path)


def test_a_tagger_diverges_for_different_clips_and_not_for_the_same(tagger: AstTagger) -> None:
    one, other = tagger.rows(tones(200, 500), RATE), tagger.rows(tones(2000, 5000, seconds=1.5), RATE)
    (name,) = tagger.metrics
    assert one["logits"].shape == (2, 5)
    assert tagger.score(one, one, ["a", "b"]).values[name] == pytest.approx(0, abs=1e-4)
    assert tagger.score(one, other, ["a", "b"]).values[name] > 1e-3


def test_the_divergence_is_that_of_the_pairs_softmax() -> None:
    p, q = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]), np.array([[0.2, 0.2, 0.6], [0.1, 0.1, 0.8]])
    expected = (p * np.log(p / q)).sum(axis=1).mean()
    assert kl_softmax(np.log(p) + 3, np.log(q) - 5) == pytest.approx(expected, abs=1e-5)
    extreme = kl_softmax(np.array([[500.0, 0.0]]), np.array([[0.0, 500.0]]))
    assert extreme == pytest.approx(np.log(1e6), rel=1e-3)


def test_the_mel_proxy_is_the_distance_over_all_frames_of_all_clips() -> None:
    proxy = MelProxy(RATE)
    one, other = tones(200, 900, 1500), tones(300, 2500, seconds=1.1)
    (name,) = proxy.metrics
    found = proxy.score(proxy.rows(one, RATE), proxy.rows(other, RATE), []).values[name]
    frames = [Moments.of(np.concatenate([proxy.mel(clip) for clip in clips])) for clips in (one, other)]
    assert found == pytest.approx(frechet_distance(*frames), rel=1e-4)
    assert name.startswith("fd_mel_proxy-")
    assert MelProxy(24000).metrics != (name,)


def test_rows_are_read_in_order_whichever_store_wrote_them(tmp_path: Path) -> None:
    RowStore(tmp_path).add([4, 5], {"x": np.array([[4.0], [5.0]])})
    store = RowStore(tmp_path)
    assert store.missing(6) == [0, 1, 2, 3]
    store.add([0, 1, 2, 3], {"x": np.arange(4.0)[:, None]})
    assert store.missing(6) == []
    assert RowStore(tmp_path).read()["x"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert store.read([5, 0, 3])["x"][:, 0].tolist() == [5, 0, 3]


def test_several_writers_add_rows_at_once_and_rows_made_twice_count_once(tmp_path: Path) -> None:
    one, other = RowStore(tmp_path), RowStore(tmp_path)
    assert one.missing(4) == other.missing(range(4)) == [0, 1, 2, 3]
    one.add([0, 1], {"x": np.array([[0.0], [1.0]])})
    other.add([2, 3], {"x": np.array([[2.0], [3.0]])})
    other.add([1], {"x": np.array([[1.0]])})
    assert (one.missing(4), other.missing(range(2, 4))) == ([2, 3], [])
    assert RowStore(tmp_path).missing(4) == []
    assert RowStore(tmp_path).read()["x"][:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["torn", "empty", "encrypted", "another"])
def test_a_damaged_file_is_named_and_its_rows_are_missing_again(tmp_path: Path, damage: str) -> None:
    kept = RowStore(tmp_path)
    kept.add([0, 1], {"x": np.zeros((2, 2))})
    kept.add([2], {"x": np.ones((1, 2))})
    (file, _) = sorted(tmp_path.glob("*.npz"))
    whole = file.read_bytes()
    if damage == "another":
        np.savez(file, items=np.arange(2), x=np.zeros((1, 2)))
    else:
        directory = whole.index(b"PK\x01\x02") + 8
        flagged = whole[:directory] + b"\x01" + whole[directory + 1 :]
        file.write_bytes({"torn": whole[:-30], "empty": b"", "encrypted": flagged}[damage])
    warnings: list[str] = []
    store = RowStore(tmp_path, warnings.append)
    assert store.missing(3) == [0, 1]
    (warning,) = warnings
    assert warning.startswith(f"{file}: was damaged (")
    assert warning.endswith("its rows are computed again")
    store.add([0, 1], {"x": np.zeros((2, 2))})
    assert RowStore(tmp_path, warnings.append).read()["x"][:, 0].tolist() == [0, 0, 1]
    assert warnings == [warning]


def test_a_perplexity_beyond_the_largest_float_is_left_out_and_its_loss_kept() -> None:
    assert likelihood_scores(800.0, [0.0]) == {"ce": 800.0, "ce_0": 0.0, "ppl_0": 1.0}
