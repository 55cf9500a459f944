"""What to build: the specification of a corpus, and how two of them differ.

The specification is everything the user chooses that decides the content. Its identity leaves out where things lie:
paths enter by what is found there.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from ssmttm.codec.facts import CodecFacts
from ssmttm.errors import InputError

RECIPE = 1
"""Moves when the same specification would make other tokens than before."""


class BuildSpec(BaseModel):
    """What a corpus is made of, how it is cut, split and turned into tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["bach", "folder"]
    audio: Path | None = None
    """folder: the directory of wav, flac, ogg and mp3 files."""
    captions: Path | None = None
    """folder: captions by file, as CSV, JSON, JSONL, or a MTG-Jamendo TSV."""
    tags: Path | None = None
    """folder: a MTG-Jamendo TSV, whose tags make the captions that `captions` does not give."""
    licence: str | None = None
    """folder: the licence of tracks whose row has none of its own."""
    language: str = "en"
    """Of the captions; those made here are English."""
    limit: int | None = Field(default=None, gt=0)
    """Tracks used at most, drawn by the seed."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Decides which tracks a limit takes, the splits, the variety and the codec's start."""
    segment_seconds: float = Field(default=10.0, gt=0)
    """Seconds of a clip."""
    min_fill: float = Field(default=0.5, gt=0, le=1)
    """A track's last clip is kept (padded) when it fills at least this share of a segment."""
    valid: float = Field(default=0.1, ge=0, lt=1)
    """Share of the tracks held out for validation; one at least unless 0."""
    test: float = Field(default=0.0, ge=0, lt=1)
    """Share of the tracks held out for testing; one at least unless 0."""
    tempo_bpm: float = Field(default=90.0, ge=20, le=300)
    """bach: quarter notes a minute where the score gives no tempo."""
    transpose: bool = False
    """bach: move each rendering by -5 to +6 semitones."""
    orchestrate: bool = False
    """bach: give each rendering one of several ensembles in place of the score's own voices."""
    versions: int = Field(default=1, ge=1, le=100)
    """bach: renderings of each score; more than one needs transpose or orchestrate."""
    codec: Literal["rvq", "encodec", "dac"] = "rvq"
    """rvq is fitted to the music; encodec and dac are pretrained."""
    codec_model: str | None = None
    """encodec, dac: the model's folder or name on the hub; one usual for the codec where not given."""
    codebooks: int = Field(default=4, ge=1, le=32)
    """Of a pretrained codec, the first so many of those it has."""
    codebook_size: int = Field(default=1024, ge=2, le=65535)
    sample_rate: int = Field(default=16000, ge=8000, le=96000)
    frame_rate: float = Field(default=50, ge=10, le=200)
    """Frames a second; a whole number for rvq. A pretrained codec decides its own rates and entries."""
    mel_bands: int = Field(default=64, ge=8, le=256)

    @model_validator(mode="after")
    def _consistent(self) -> "BuildSpec":
        folder_only = {
            "audio": self.audio,
            "captions": self.captions,
            "tags": self.tags,
            "licence": self.licence,
        }
        if self.source == "folder" and self.audio is None:
            raise ValueError("source folder needs audio: the directory of the files")
        if self.source == "bach":
            for key, value in folder_only.items():
                if value is not None:
                    raise ValueError(f"{key} is for source folder; source bach brings its own music")
            if self.language != "en":
                raise ValueError(f"language is {self.language!r}; source bach has English captions: en")
            if self.versions > 1 and not (self.transpose or self.orchestrate):
                raise ValueError(
                    f"versions is {self.versions}, but without transpose or orchestrate all would be the same"
                )
        elif self.transpose or self.orchestrate or self.versions > 1:
            raise ValueError("transpose, orchestrate and versions are for source bach")
        if self.valid + self.test >= 1:
            raise ValueError(f"valid {self.valid} and test {self.test} leave nothing to train on")
        if self.codec != "rvq":
            for key in ("codebook_size", "sample_rate", "frame_rate", "mel_bands"):
                if key in self.model_fields_set:
                    raise ValueError(f"{key} is for codec rvq; the model of codec {self.codec} has its own")
            return self
        if self.codec_model is not None:
            raise ValueError("codec_model is for codecs encodec and dac; rvq is fitted to the music")
        if self.sample_rate % self.frame_rate or self.frame_rate % 1:
            raise ValueError(
                f"sample_rate {self.sample_rate} is not a multiple of frame_rate {self.frame_rate:g}"
            )
        if self.frames < 2:
            raise ValueError(f"segment_seconds {self.segment_seconds} is less than two frames")
        return self

    def settled(self, codec: CodecFacts) -> "BuildSpec":
        """With what a pretrained codec decides; raises InputError where a clip would be shorter than two frames."""
        settled = self.model_copy(
            update={
                "sample_rate": codec.sample_rate,
                "frame_rate": codec.frame_rate,
                "codebook_size": codec.codebook_size,
            }
        )
        if settled.frames < 2:
            raise InputError(
                f"segment_seconds is {self.segment_seconds:g}: less than two frames of codec {codec.name}"
            )
        return settled

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return round(self.segment_seconds * self.frame_rate)

    @property
    def min_frames(self) -> int:
        """Frames of music a clip has at least."""
        return max(1, round(self.frames * self.min_fill))

    def identity(self) -> dict[str, JsonValue]:
        """Everything but the paths, as plain JSON; a pretrained codec is known by its fingerprint."""
        paths = {"audio", "captions", "tags", "codec_model"}
        return self.model_dump(mode="json", exclude=paths if self.codec == "rvq" else paths | {"mel_bands"})


def differences(before: dict[str, JsonValue], now: dict[str, JsonValue], prefix: str = "") -> list[str]:
    """Say where two records differ, a line a key: `codebooks: 4 before, 2 now`."""
    found: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {_shown(old)} before, {_shown(new)} now")
    return found


def _shown(value: JsonValue) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
