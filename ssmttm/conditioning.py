"""Captions as what a model is conditioned on, two ways: bytes, encoded by a part of the model, or the cached
embeddings of a pretrained encoder that stays frozen.

Either way text is padded on the left, so that it ends where the music begins.
"""

from ssmttm.byte_encoder import ByteEncoder, collate_bytes
from ssmttm.embeddings import EmbeddingCache
from ssmttm.encoder_files import encoder_fingerprint
from ssmttm.text_batch import TextBatch

__all__ = ["ByteEncoder", "EmbeddingCache", "TextBatch", "collate_bytes", "encoder_fingerprint"]
