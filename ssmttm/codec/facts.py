"""Facts of a codec that plans, corpora and models need, without the codec."""

from pydantic import BaseModel, ConfigDict, Field


class CodecFacts(BaseModel):
    """What a model needs to know of the codec that made the tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    fingerprint: str
    """sha256 over everything that decides which tokens an audio signal gets."""
    sample_rate: int = Field(gt=0)
    """Hz."""
    frame_rate: float = Field(gt=0)
    """Frames a second."""
    n_codebooks: int = Field(gt=0)
    codebook_size: int = Field(gt=1, le=65536)
