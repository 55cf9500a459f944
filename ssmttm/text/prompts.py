"""Any captions as a batch of text for a model that exists: what is sung to order and what is evaluated.

Training reads the captions of its corpus; here they come from outside, and must reach the model the way it learnt to
read them: the same bytes, or the same frozen encoder, known by its fingerprint.
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
    """The pretrained encoder a model was trained with, and where its embeddings are kept."""

    source: str
    """Its folder, or its name on the hub."""
    fingerprint: str
    """Of the encoder the model was trained with, 64 hex digits: `Run.text_encoder`."""
    cache: Path
    """The folder of all embedding caches, `Root.text`: a caption is encoded once."""

    def embeddings(self, captions: Sequence[str], max_positions: int) -> EmbeddingCache:
        """Return a cache that holds the captions; InputError where the encoder is gone or another one."""
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
    """Return captions as a model with `text` reads them, in their order; an empty one counts as dropped.

    encoder: needed where text.encoder is `frozen`, and of no use elsewhere. Raises InputError where there are no
    captions, or where the encoder is missing or not the model's.
    """
    if not captions:
        raise InputError("no captions: give at least one, an empty one for music without a prompt")
    kept = [False] * len(captions)
    if text.encoder == "bytes":
        return collate_bytes(captions, kept, text)
    if encoder is None:
        raise InputError("the model reads captions through a frozen text encoder: name its folder")
    return encoder.embeddings(captions, text.max_positions).batch(captions, kept)
