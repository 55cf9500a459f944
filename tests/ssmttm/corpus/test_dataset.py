"""Token shards are read as they were written, damage is named, and the clips of a step are a pure function."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from ssmttm.corpus.dataset import TokenDataset, batch_indices, caption_dropout, position_dropout
from ssmttm.corpus.manifest import load_manifest, verify_corpus
from ssmttm.errors import InputError
from tests.conftest import flip_a_byte
from tests.corpora import write_tiny_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_tiny_corpus(tmp_path / "tiny", clips=20, codebooks=2, frames=30, codebook_size=32, shard_clips=8)
    return tmp_path / "tiny"


def test_clips_are_read_across_shards_in_any_order(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "train")
    whole = np.concatenate([np.load(corpus / f"shards/train-{n:05d}.npy") for n in range(3)])
    order = [19, 0, 8, 7, 8]
    codes = dataset.codes(order)
    assert codes.dtype == np.int64
    assert np.array_equal(codes, whole[order])
    assert len(dataset) == 20


def test_lengths_and_captions_belong_to_their_clips(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "train")
    lengths = dataset.lengths(range(20))
    codes = dataset.codes(range(20))
    assert (lengths[1::4] == 30).all()
    assert (lengths[::4] < 30).all()
    assert all((codes[i, :, n:] == 0).all() for i, n in enumerate(lengths))
    assert dataset.captions([6])[0].endswith("number 3.")
    assert load_manifest(corpus).splits["train"].valid_frames == lengths.sum()


def test_a_dataset_travels_to_another_process_as_its_path(corpus: Path) -> None:
    dataset = TokenDataset(corpus, "valid")
    payload = pickle.dumps(dataset)
    assert len(payload) < 1000
    assert np.array_equal(pickle.loads(payload).codes([0, 3]), dataset.codes([0, 3]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-100]), "not a whole array"),
        (lambda shard: shard.unlink(), "missing"),
        (
            lambda shard: np.save(shard, np.zeros((8, 2, 29), np.uint16)),
            r"the manifest says uint16 \(8, 2, 30\)",
        ),
        (
            lambda shard: np.save(shard, np.zeros((8, 2, 30), np.int32)),
            r"the manifest says uint16 \(8, 2, 30\)",
        ),
        (lambda shard: np.save(shard, np.array([{"a": 1}])), r"holds object \(1,\); the manifest says"),
    ],
    ids=["truncated", "missing", "shape", "type", "pickled"],
)
def test_a_damaged_shard_is_named(corpus: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    damage(corpus / "shards/train-00001.npy")
    with pytest.raises(InputError, match=rf"train-00001\.npy: .*{message}"):
        TokenDataset(corpus, "train")


@pytest.mark.parametrize(
    ("dtype", "shape", "said"),
    [
        ("<u2", "(1000000000000, 2, 30)", r"holds uint16 \(1000000000000, 2, 30\); the manifest says uint16"),
        ("<u2", "(4611686018427387904, 4, 30)", "holds uint16"),
        ("<u2", "(-8, 2, 30)", r"its header has the shape \(-8, 2, 30\)"),
        ("<u2", "(8, 2, 30.0)", "its header"),
        ("<u2", "(" * 9000, "its header is damaged"),
        ("|O", "(8, 2, 30)", "holds object"),
        ("<V99999999999", "(8, 2, 30)", "its header is damaged"),
    ],
)
def test_what_a_header_announces_takes_no_memory(corpus: Path, dtype: str, shape: str, said: str) -> None:
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    (corpus / "shards/train-00001.npy").write_bytes(start + header + bytes(8 * 2 * 30 * 2))
    with pytest.raises(InputError, match=rf"train-00001\.npy: .*{said}"):
        TokenDataset(corpus, "train")


def test_files_of_absurd_size_are_refused_unread(corpus: Path) -> None:
    clips = corpus / "clips-train.jsonl"
    lines = clips.read_text().splitlines()
    clips.write_text("\n".join([lines[0].replace("number 0", "x" * 2**20), *lines[1:]]) + "\n")
    dataset = TokenDataset(corpus, "train")
    assert dataset.captions([1])
    with pytest.raises(InputError, match=r"line 1 is not a clip: it is longer than 1,048,576 bytes"):
        dataset.captions([0])
    with (corpus / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(InputError, match=r"manifest\.json: cannot be read: holds more than 67,108,864 bytes"):
        load_manifest(corpus)


def test_an_impossible_code_is_found_when_it_is_read(corpus: Path) -> None:
    codes = np.load(corpus / "shards/train-00001.npy")
    codes[2, 1, 5] = 32
    np.save(corpus / "shards/train-00001.npy", codes)
    dataset = TokenDataset(corpus, "train")
    dataset.codes([0, 9, 11])
    with pytest.raises(InputError, match=r"train-00001.*clip 10 has the code 32"):
        dataset.codes([0, 10])


@pytest.mark.parametrize("file", ["shards/valid-00000.npy", "clips-train.jsonl", "codec/rvq.npz"])
def test_verifying_names_the_file_that_changed(corpus: Path, file: str) -> None:
    manifest = load_manifest(corpus)
    verify_corpus(corpus, manifest)
    flip_a_byte(corpus / file, -1)
    with pytest.raises(InputError, match=f"{file}: sha256 is .* the file has changed"):
        verify_corpus(corpus, manifest)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda text: text.replace('"format": 1', '"format": 9'), "format is 9"),
        (
            lambda text: text.replace('"frames": 30', '"frames": 31'),
            "fingerprint is .* the manifest was edited",
        ),
        (lambda text: text[:-40], "not valid JSON"),
        (lambda text: "[" * 100_000, "not valid JSON"),
        (lambda text: text.replace("shards/train-00000.npy", "../train-00000.npy"), "inside the corpus"),
        (lambda text: text.replace("shards/train-00000.npy", "/etc/passwd"), "inside the corpus"),
    ],
)
def test_a_bad_manifest_is_explained(corpus: Path, edit, match: str) -> None:  # type: ignore[no-untyped-def]
    path = corpus / "manifest.json"
    path.write_text(edit(path.read_text()))
    with pytest.raises(InputError, match=match):
        load_manifest(corpus)


def test_a_missing_corpus_and_a_missing_split_are_explained(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no corpus here"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no split 'test'; it has train, valid"):
        TokenDataset(corpus, "test")


def test_every_epoch_sees_every_clip_once() -> None:
    seen = np.concatenate([batch_indices(10, seed=3, step=s, batch=4) for s in range(5)])
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])


def test_a_batch_larger_than_the_split_covers_several_epochs() -> None:
    assert np.bincount(batch_indices(3, seed=0, step=2, batch=9), minlength=3).tolist() == [3, 3, 3]


def test_the_order_of_clips_never_changes() -> None:
    # A change would give every finished run another order of its training set.
    assert batch_indices(1000, seed=7, step=2, batch=6).tolist() == [527, 189, 578, 986, 180, 497]
    assert np.flatnonzero(caption_dropout(7, 2, 40, 0.1)).tolist() == [21, 32, 35, 36]


def test_dropout_has_its_rate() -> None:
    captions = np.concatenate([caption_dropout(0, step, 128, 0.1) for step in range(200)])
    positions = position_dropout(0, 5, 128, 64, 0.25)
    assert positions.shape == (128, 64)
    assert abs(captions.mean() - 0.1) < 0.01
    assert abs(positions.mean() - 0.25) < 0.02
    assert not caption_dropout(0, 0, 128, 0.0).any()
    assert caption_dropout(0, 0, 128, 1.0).all()
