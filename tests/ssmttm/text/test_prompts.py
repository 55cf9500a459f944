"""Captions from outside reach a model in the form of its training."""

from pathlib import Path

import pytest
import torch

from ssmttm.errors import InputError
from ssmttm.text.byte_encoder import collate_bytes
from ssmttm.text.config import TextConfig
from ssmttm.text.embeddings import EmbeddingCache
from ssmttm.text.encoder_files import encoder_fingerprint
from ssmttm.text.prompts import FrozenEncoder, read_captions

CAPTIONS = ["slow strings in a large hall", "  ", "drums"]
FROZEN = TextConfig(encoder="frozen", dim=384, max_positions=4)


@pytest.fixture
def encoder(minilm: str, tmp_path: Path) -> FrozenEncoder:
    return FrozenEncoder(minilm, encoder_fingerprint(tmp_path, minilm), tmp_path)


def test_bytes_are_read_as_in_training() -> None:
    text = TextConfig(dim=8)
    read, trained = read_captions(CAPTIONS, text), collate_bytes(CAPTIONS, [False] * 3, text)
    assert torch.equal(read.values, trained.values)
    assert read.dropped.tolist() == [False, True, False]


def test_a_frozen_encoder_reads_as_in_training_and_each_caption_once(encoder: FrozenEncoder) -> None:
    read = read_captions(CAPTIONS, FROZEN, encoder)
    trained = EmbeddingCache.build(encoder.cache, encoder.source, CAPTIONS, max_positions=4)
    assert torch.equal(read.values, trained.batch(CAPTIONS, [False] * 3).values)
    assert read.values.shape == (3, 4, 384)
    assert read.dropped.tolist() == [False, True, False]
    read_captions(["drums", *CAPTIONS], FROZEN, encoder)
    assert len(list(trained.folder.glob("*.npy"))) == 1


def test_a_wrong_encoder_and_missing_captions_are_refused(encoder: FrozenEncoder) -> None:
    other = FrozenEncoder(encoder.source, "0" * 64, encoder.cache)
    with pytest.raises(InputError, match=r"not the one the model was trained with: .* the model's is 0{12}"):
        read_captions(["drums"], FROZEN, other)
    with pytest.raises(InputError, match="give its folder"):
        read_captions(["drums"], FROZEN)
    with pytest.raises(InputError, match="no captions"):
        read_captions([], TextConfig(dim=8))
