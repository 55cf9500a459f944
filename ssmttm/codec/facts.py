"""Facts of a codec for plans, corpora and models, which read them without loading the codec."""

from pydantic import Field

from ssmttm.files import Frozen


class CodecFacts(Frozen):
    """Facts of the codec that made the tokens."""

    name: str
    fingerprint: str
    """sha256 over everything that decides which tokens an audio signal gets."""
    sample_rate: int = Field(gt=0)
    """Hz."""
    frame_rate: float = Field(gt=0)
    """Frames a second."""
    n_codebooks: int = Field(gt=0)
    codebook_size: int = Field(gt=1, le=65536)
