"""Encode captions from outside a corpus for a trained model, for generation and evaluation.

The model must get them in the form of its training: as bytes, or from the same frozen encoder, identified by its
fingerprint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssmttm.errors import InputError
from ssmttm.text.byte_encoder import collate_bytes
from ssmttm.text.config import TextConfig
from ssmttm.text.embeddings import EmbeddingCache
from ssmttm.text.encoder_files import encoder_fingerprint
from ssmttm.text.text_batch import TextBatch


@dataclass(frozen=True)
class FrozenEncoder:
    """The pretrained encoder of a model's training, and the folder of its embeddings."""

    source: str
    """Its folder, or its name on the hub."""
    fingerprint: str
    """64 hex digits of the encoder in training: `Run.text_encoder`."""
    cache: Path
    """The folder of all embedding caches, `Root.text`."""

    def embeddings(self, captions: Sequence[str], max_positions: int) -> EmbeddingCache:
        """Return a cache with the captions; raises InputError if the encoder is missing or another one."""
        found = encoder_fingerprint(self.cache, self.source)
        if found != self.fingerprint:
            raise InputError(
                f"text encoder {self.source!r} is not the one the model was trained with: its fingerprint is "
                f"{found[:12]}, the model's is {self.fingerprint[:12]}"
            )
        return EmbeddingCache.build(self.cache, self.source, captions, max_positions=max_positions)


def read_captions(
    captions: Sequence[str], text: TextConfig, encoder: FrozenEncoder | None = None
) -> TextBatch:
    """Return captions as a batch for a model with `text`; an empty caption counts as dropped.

    encoder: required if text.encoder is `frozen`, else ignored. Raises InputError if there are no captions, or if the
    encoder is missing or not the model's.
    """
    if not captions:
        raise InputError("no captions: give at least one; an empty one gives music without a prompt")
    kept = [False] * len(captions)
    if text.encoder == "bytes":
        return collate_bytes(captions, kept, text)
    if encoder is None:
        raise InputError("the model reads captions through a frozen text encoder: give its folder")
    return encoder.embeddings(captions, text.max_positions).batch(captions, kept)
