import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ssmttm.compat import keep_freed_memory, tame_torchaudio
from ssmttm.errors import InputError
from ssmttm.text.byte_encoder import ByteEncoder, collate_bytes
from ssmttm.text.config import TextConfig
from ssmttm.text.embeddings import EmbeddingCache
from ssmttm.text.encoder_files import encoder_fingerprint

CAPTIONS = ["calm piano", "Fröhliche Märsche, 明るい曲", "x", "a" * 17]
NONE_DROPPED = [False] * 4
FOUR = TextConfig(dim=8, patch=4)


def test_bytes_are_the_ids_of_byt5():
    tame_torchaudio()
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    batch = collate_bytes(CAPTIONS, NONE_DROPPED, TextConfig(dim=8))
    for ids, caption in zip(batch.values, CAPTIONS, strict=True):
        assert ids[ids != tokenizer.pad_token_id].tolist() == tokenizer(caption)["input_ids"]


def test_the_mask_marks_whole_patches_and_padding_is_on_the_left():
    batch = collate_bytes(["1234567", "12345678"], [False] * 2, TextConfig(dim=8, patch=8))
    assert batch.values.shape == (2, 16)  # eight bytes and the end of text need two patches
    assert batch.mask.tolist() == [[False, True], [True, True]]
    assert batch.values[0, :8].eq(0).all()


def test_a_long_caption_is_cut_but_still_ends():
    config = TextConfig(dim=8, patch=4, max_positions=3)
    batch = collate_bytes(["é" * 50], [False], config)
    assert batch.values.shape == (1, 12)
    assert batch.values[0, -1] == 1


@pytest.fixture
def byte_encoder():
    torch.manual_seed(0)
    return ByteEncoder(FOUR)


def test_the_encoding_of_a_caption_does_not_depend_on_the_batch(byte_encoder):
    together = byte_encoder(collate_bytes(CAPTIONS, NONE_DROPPED, FOUR).values)
    for row, caption in zip(together, CAPTIONS, strict=True):
        alone = byte_encoder(collate_bytes([caption], [False], FOUR).values)[0]
        torch.testing.assert_close(row[-len(alone) :], alone)


def test_the_encoder_sees_every_byte_of_a_caption(byte_encoder):
    text = "slow strings"
    variants = [text] + [text[:i] + "Z" + text[i + 1 :] for i in range(len(text))]
    rows = byte_encoder(collate_bytes(variants, [False] * len(variants), FOUR).values).flatten(1)
    for i, row in enumerate(rows):
        assert all((row - other).abs().max() > 1e-4 for other in rows[:i])


def test_freed_memory_is_kept_where_glibc_is():
    assert keep_freed_memory() == (sys.platform == "linux")


@pytest.fixture(scope="module")
def cache(minilm, tmp_path_factory) -> EmbeddingCache:
    return EmbeddingCache.build(tmp_path_factory.mktemp("text"), minilm, [*CAPTIONS, ""])


class Steps(list):
    """The calls of a build's `progress`."""

    def __call__(self, done, of):
        self.append((done, of))


def edit_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def test_a_batch_of_embeddings_is_padded_on_the_left(cache):
    batch = cache.batch(["x", CAPTIONS[1], ""], [True, False, False])
    assert batch.values.shape == (3, len(cache.embeddings(CAPTIONS[1])), 384)
    assert batch.mask[0].tolist() == sorted(batch.mask[0].tolist())
    length = int(batch.mask[0].sum())
    assert np.array_equal(batch.values[0, -length:].numpy(), cache.embeddings("x"))
    assert batch.values[0, :-length].eq(0).all()
    assert batch.dropped.tolist() == [True, False, True]


def test_a_second_build_computes_only_what_is_missing(minilm, tmp_path):
    steps = Steps()
    first = EmbeddingCache.build(tmp_path, minilm, ["a", "b"], progress=steps)
    again = EmbeddingCache.build(tmp_path, minilm, ["b", "a"], progress=steps)
    assert steps[-1] == (2, 2)
    assert again.folder == first.folder
    more = EmbeddingCache.build(tmp_path, minilm, ["a", "b", "c"], progress=steps)
    assert steps[-1] == (1, 1)
    assert np.array_equal(more.embeddings("a"), first.embeddings("a"))


def test_a_fingerprint_is_of_the_files_and_not_of_their_place(minilm, tmp_path):
    before = encoder_fingerprint(tmp_path / "caches", minilm)
    copy = tmp_path / "elsewhere"
    shutil.copytree(minilm, copy)
    assert encoder_fingerprint(tmp_path / "caches", str(copy)) == before
    (copy / "README.md").write_text("changed")
    assert encoder_fingerprint(tmp_path / "caches", str(copy)) == before
    edit_config(copy, layer_norm_eps=1e-6)
    assert encoder_fingerprint(tmp_path / "caches", str(copy)) != before


def test_of_two_builds_at_once_one_computes(minilm, tmp_path):
    steps = Steps()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            lambda _: EmbeddingCache.build(tmp_path, minilm, ["a", "b"], progress=steps), range(2)
        )
    assert steps == [(2, 2)]
    assert len(list(tmp_path.glob("*/*.npy"))) == 1
    for caption in ("a", "b"):
        assert np.array_equal(first.embeddings(caption), second.embeddings(caption))


def test_a_shard_without_its_index_is_ignored_and_a_broken_index_is_an_error(minilm, tmp_path):
    cache = EmbeddingCache.build(tmp_path, minilm, ["a"])
    index = cache.folder / "00000.json"
    index.unlink()
    with pytest.raises(InputError, match="no embeddings of caption 'a'"):
        EmbeddingCache(cache.folder).batch(["a"], [False])
    assert "a" in EmbeddingCache.build(tmp_path, minilm, ["a"])
    whole, rows = index.read_text(), json.loads(index.read_text())
    index.write_text(json.dumps(rows | {"rows": 10**12}))
    with pytest.raises(
        InputError, match=r"00000\.npy: holds float16 .*; the cache says float16 \(1000000000000, "
    ):
        EmbeddingCache(cache.folder).batch(["a"], [False])
    index.write_text(json.dumps(rows | {"captions": {key: [0, 99] for key in rows["captions"]}}))
    with pytest.raises(InputError, match=r"00000\.json: not a readable part"):
        EmbeddingCache(cache.folder)
    index.write_text(whole)
    cache.folder.joinpath("00000.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"00000\.npy: not a whole array"):
        EmbeddingCache(cache.folder).batch(["a"], [False])
    index.write_text("{")
    with pytest.raises(InputError, match=r"00000\.json: not a readable part of an embedding cache"):
        EmbeddingCache.build(tmp_path, minilm, ["a"])


WORDS = ("calm", "loud", "piano", "strings", "drums", "a", "the", "in", "slow", "hall", "march", "of", "and")


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    """A folder like google/flan-t5-base: an encoder-decoder of random weights and its tokenizer's files."""
    tame_torchaudio()
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    folder = tmp_path_factory.mktemp("t5")
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), *((f"▁{word}", -3.0) for word in WORDS)]
    vocab += [(letter, -8.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(folder)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(vocab), feed_forward_proj="gated-gelu", **sizes)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("encoder", "loader", "dtype", "tolerance"),
    [
        ("t5", "T5EncoderModel", "float32", 1e-6),
        ("t5", "T5EncoderModel", "float16", 1e-3),
        ("minilm", "AutoModel", "float16", 2e-3),
    ],
)
def test_cached_embeddings_are_those_of_a_padded_batch(request, tmp_path, encoder, loader, dtype, tolerance):
    import transformers

    folder = request.getfixturevalue(encoder)
    captions = ["calm piano", "a slow march of loud drums and strings in the hall", "zither", "the slow hall"]
    cache = EmbeddingCache.build(tmp_path, folder, captions, dtype=dtype, max_positions=10)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, loader).from_pretrained(folder).eval()
    inputs = tokenizer(captions, padding=True, truncation=True, max_length=10, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
    batch = cache.batch(captions, [False] * 4)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert batch.mask.sum(1).tolist() == lengths
    assert len(set(lengths)) > 2
    for cached, mask, theirs, real in zip(
        batch.values, batch.mask, expected, inputs["attention_mask"].bool(), strict=True
    ):
        torch.testing.assert_close(cached[mask].float(), theirs[real], atol=tolerance, rtol=tolerance)


def test_a_long_caption_is_cut_and_still_ends_in_a_cache_of_its_length(t5, tmp_path):
    cache = EmbeddingCache.build(tmp_path, t5, ["calm " * 30, "calm " * 2], max_positions=3)
    assert cache.embeddings("calm " * 30).shape == (3, 24)
    # Both have two words and the end of text.
    assert np.array_equal(cache.embeddings("calm " * 30), cache.embeddings("calm " * 2))
    other = EmbeddingCache.build(tmp_path, t5, ["calm"])
    assert other.folder != cache.folder
    assert other.folder.name.split("-")[0] == cache.folder.name.split("-")[0]  # of the same encoder


def test_captions_are_kept_in_shards_and_a_stopped_build_is_continued(t5, tmp_path, monkeypatch):
    from ssmttm.text import embeddings

    monkeypatch.setattr(embeddings, "_SHARD_CAPTIONS", 10)
    captions = [f"{WORDS[i % 13]} {WORDS[i // 13]}" for i in range(25)]

    def stop(done, _of):
        if done > 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EmbeddingCache.build(tmp_path, t5, captions, progress=stop)
    steps = Steps()
    cache = EmbeddingCache.build(tmp_path, t5, captions, progress=steps)
    assert steps[-1] == (15, 15)
    before = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*.npy")}
    assert len(before) == 3
    more = EmbeddingCache.build(tmp_path, t5, [*captions, "zither"])
    after = {path: path.stat().st_mtime_ns for path in more.folder.glob("*.npy")}
    assert len(after) == 4
    assert before.items() <= after.items()
    whole = EmbeddingCache.build(tmp_path / "whole", t5, captions)
    for caption in captions:
        assert np.allclose(more.embeddings(caption), whole.embeddings(caption), atol=1e-3)


def test_a_build_is_continued_after_a_full_disk(t5, small_disk):
    disk = small_disk(64 * 1024)
    captions = [f"{first} {second} {third}" for first in WORDS for second in WORDS for third in WORDS[:4]]
    with pytest.raises(OSError, match="No space left"):
        EmbeddingCache.build(disk, t5, captions)
    (cache,) = disk.glob("*/cache.json")
    assert captions[0] not in EmbeddingCache(cache.parent)
    (cache.parent / ".00000.npy.1.tmp").write_bytes(bytes(1024))  # of a killed build
    assert len(EmbeddingCache.build(disk, t5, captions[:9]).embeddings(captions[0])) == 4
    assert not [path for path in cache.parent.iterdir() if path.suffix in {".tmp", ".partial"}]


def test_weights_of_another_precision_are_computed_in_float32(t5, tmp_path):
    import safetensors.torch

    half = shutil.copytree(t5, tmp_path / "half")
    tensors = safetensors.torch.load_file(half / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    safetensors.torch.save_file(halves, half / "model.safetensors", {"format": "pt"})
    edit_config(half, dtype="bfloat16")
    exact, near = (
        EmbeddingCache.build(tmp_path, str(folder), ["x"], dtype="float32").embeddings("x")
        for folder in (t5, half)
    )
    assert np.abs(near - exact).max() < 0.05
    assert (near.view(np.uint32) & 0xFFFF).any()  # numbers that bfloat16 lacks


def test_missing_and_damaged_weights_are_explained(t5, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = shutil.copytree(t5, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    for encoder, message in (
        ("google/flan-t5-base", r"text encoder 'google/flan-t5-base'.*model\.safetensors into a folder"),
        (str(empty), r"empty lacks config\.json or \*\.safetensors"),
        (str(broken), r"text encoder .*broken: cannot be loaded"),
    ):
        with pytest.raises(InputError, match=message):
            EmbeddingCache.build(tmp_path, encoder, ["a"])


def test_code_in_an_encoders_folder_is_not_run_and_asks_no_question(t5, tmp_path, monkeypatch):
    model = shutil.copytree(t5, tmp_path / "model")
    edit_config(model, model_type="theirs", auto_map={"AutoConfig": "theirs.Theirs"})
    (model / "theirs.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with pytest.raises(InputError, match=r"text encoder .*model: cannot be loaded"):
        EmbeddingCache.build(tmp_path / "caches", str(model), ["a"])
    assert not asked
    assert not (tmp_path / "run").exists()


def test_a_name_on_the_hub_stands_for_the_local_copy(t5, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    copy = tmp_path / "hub/models--anyone--t5"
    shutil.copytree(t5, copy / "snapshots/0123abc")
    (copy / "refs").mkdir()
    (copy / "refs/main").write_text("0123abc")
    assert encoder_fingerprint(tmp_path, "anyone/t5") == encoder_fingerprint(tmp_path, t5)
    (copy / "snapshots/0123abc/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"'anyone/t5': .* lacks config\.json or"):
        encoder_fingerprint(tmp_path, "anyone/t5")
