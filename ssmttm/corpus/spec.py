"""The specification of a corpus, and the differences of two.

A specification holds all choices of the user that decide the content. Its identity leaves paths out: the content at
a path counts instead.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from ssmttm.codec.facts import CodecFacts
from ssmttm.errors import InputError
from ssmttm.files import Frozen

_OF_LATER_STAGES = {"limit", "valid", "test", "min_fill", "licence", "language", "group_by", "splits"}
GROUP_BY = ("album", "artist", "content")
VALID = 0.1
"""Share of the tracks held out for validation if the user gives none."""
RECIPE = 1
"""Version of the build: raised when the same specification would give other tokens than before."""


def _words(given: object) -> object:
    """Return the names of a text such as `artist,album`, sorted; `none` is no name."""
    words = given.split(",") if isinstance(given, str) else given
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        return given
    found = sorted({" ".join(word.split()) for word in words})
    if "" in found or ("none" in found and len(found) > 1):
        raise ValueError("should be names with commas between them, such as artist,album, or none alone")
    return tuple(word for word in found if word != "none")


class BuildSpec(Frozen):
    """The music of a corpus, and how it is cut, split and turned into tokens."""

    source: Literal["bach", "folder"]
    audio: Path | None = None
    """folder: the directory of the sound files."""
    captions: Path | None = None
    """folder: a file whose rows name file and caption, or a folder with a song.json or song.txt for each song.wav.

    If not given: captions.jsonl and the like in `audio`, else the files beside the sound files."""
    tags: Path | None = None
    """folder: an MTG-Jamendo TSV, whose tags become the captions that `captions` lacks."""
    licence: str | None = None
    """folder: the licence of tracks whose row names none."""
    language: str = "en"
    """Language of the captions; those of source bach are English."""
    limit: int | None = Field(default=None, gt=0)
    """Largest number of pieces used, drawn by the seed."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Decides the tracks of a limit, the splits, the variety and the start of the codec's fit."""
    segment_seconds: float = Field(default=10.0, gt=0)
    """Seconds of a clip."""
    min_fill: float = Field(default=0.5, gt=0, le=1)
    """A track's last clip is kept (padded) when it fills at least this share of a segment."""
    valid: float | None = Field(default=None, ge=0, lt=1)
    """Share of the tracks held out for validation, at least one track unless 0; None is 0.1, or a published split."""
    test: float | None = Field(default=None, ge=0, lt=1)
    """Share of the tracks held out for testing, at least one track unless 0; None is 0, or a published split."""
    group_by: Annotated[tuple[str, ...], BeforeValidator(_words)] = GROUP_BY
    """Facts that keep tracks in one split if they share them: of GROUP_BY, and columns of the captions file."""
    near_duplicates: float | None = Field(default=None, ge=0.5, le=1)
    """Least likeness of the harmonies (near.py) of tracks that stay in one split; None compares none."""
    splits: str | None = None
    """folder: a published split: a file or folder that lists tracks, or a column of the captions file.

    None: the captions' column `split` if it holds tracks out, else splits are drawn; `none`: they are drawn."""
    tempo_bpm: float = Field(default=90.0, ge=20, le=300)
    """bach: quarter notes a minute if the score gives no tempo."""
    transpose: bool = False
    """bach: move each rendering by -5 to +6 semitones."""
    orchestrate: bool = False
    """bach: give each rendering one of several ensembles instead of the score's own voices."""
    versions: int = Field(default=1, ge=1, le=100)
    """bach: renderings of each score; more than one needs transpose or orchestrate."""
    codec: Literal["rvq", "encodec", "dac"] = "rvq"
    """rvq is fitted to the music; encodec and dac are pretrained."""
    codec_model: str | None = None
    """encodec, dac: the model's folder or name on the hub; the codec's usual model if not given."""
    codebooks: int = Field(default=4, ge=1, le=32)
    """Number of codebooks; the first ones of a pretrained codec."""
    codebook_size: int = Field(default=1024, ge=2, le=65535)
    sample_rate: int = Field(default=16000, ge=8000, le=96000)
    frame_rate: float = Field(default=50, ge=10, le=200)
    """Frames a second; a whole number for rvq. A pretrained codec has its own rates and entries."""
    mel_bands: int = Field(default=64, ge=8, le=256)

    @model_validator(mode="after")
    def _consistent(self) -> "BuildSpec":
        if self.source == "folder" and self.audio is None:
            raise ValueError("source folder needs audio, the directory of the files")
        if self.source == "bach":
            for key in ("audio", "captions", "tags", "licence", "splits"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for source folder; source bach has its own music")
            if self.group_by != GROUP_BY:
                raise ValueError(
                    "group_by is for source folder; tracks of one score are one group of source bach"
                )
            if self.language != "en":
                raise ValueError(
                    f"language is {self.language!r}; the captions of source bach are English: en"
                )
            if self.versions > 1 and not (self.transpose or self.orchestrate):
                raise ValueError(
                    f"versions is {self.versions}, but without transpose or orchestrate all are the same"
                )
        elif self.transpose or self.orchestrate or self.versions > 1:
            raise ValueError("transpose, orchestrate and versions are for source bach")
        if sum(self.held_shares.values()) >= 1:
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
            raise ValueError(f"segment_seconds {self.segment_seconds} is shorter than two frames")
        return self

    def settled(self, codec: CodecFacts) -> "BuildSpec":
        """Return the specification with a pretrained codec's rates; raises InputError if clips are too short."""
        settled = self.model_copy(
            update={
                "sample_rate": codec.sample_rate,
                "frame_rate": codec.frame_rate,
                "codebook_size": codec.codebook_size,
            }
        )
        if settled.frames < 2:
            raise InputError(
                f"segment_seconds is {self.segment_seconds:g}: fewer than two frames of codec {codec.name}"
            )
        return settled

    @property
    def held_shares(self) -> dict[str, float]:
        """Share of the tracks held out for each split where splits are drawn."""
        return {"valid": VALID if self.valid is None else self.valid, "test": self.test or 0.0}

    @property
    def splits_path(self) -> Path | None:
        """File or folder of a published split; None if `splits` names a column or nothing."""
        path = Path(self.splits or "none").expanduser()
        return (
            path if self.splits != "none" and (path.exists() or path.suffix or len(path.parts) > 1) else None
        )

    def check_published(self, origin: str, splits: set[str]) -> None:
        """Raise InputError if shares contradict a published split, or if it leaves nothing to train or validate on."""
        for split, share in (("valid", self.valid), ("test", self.test)):
            if share is not None and split in splits:
                raise InputError(
                    f"{split} is {share:g}, but {origin} gives the {split} split; leave {split} out, or set splits to "
                    "none to draw the splits"
                )
        if "train" not in splits:
            raise InputError(f"{origin}: gives no training tracks")
        if "valid" not in splits and self.valid is None:
            raise InputError(
                f"{origin}: gives no validation tracks, which training needs; set valid to the share to draw from its "
                "training tracks, or to 0 for none"
            )

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return round(self.segment_seconds * self.frame_rate)

    @property
    def min_frames(self) -> int:
        """Smallest number of frames of music in a clip."""
        return max(1, round(self.frames * self.min_fill))

    def identity(self) -> dict[str, JsonValue]:
        """Return all fields but the paths, as plain JSON; the recipe holds a pretrained codec's fingerprint.

        The fields that finished corpora of earlier versions lack are left out at their defaults.
        """
        left_out = {"audio", "captions", "tags", "codec_model"} | (
            set() if self.codec == "rvq" else {"mel_bands"}
        )
        left_out |= {key for key in _LATER if getattr(self, key) == type(self).model_fields[key].default}
        if self.splits_path is not None:
            left_out.add("splits")
        return self.model_dump(mode="json", exclude=left_out) | dict(self.held_shares)


_LATER = ("group_by", "near_duplicates", "splits")


def reading(spec: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the entries of a specification's identity on which the frames of a track depend."""
    later = set(_OF_LATER_STAGES)
    if spec.get("source") == "folder":
        later.add("seed")
    if spec.get("codec") == "rvq":
        later |= {"segment_seconds", "codebooks", "codebook_size"}
    return {key: value for key, value in spec.items() if key not in later}


def differences(before: dict[str, JsonValue], now: dict[str, JsonValue], prefix: str = "") -> list[str]:
    """Return the differences of two records, a text for each key: `codebooks: 4 before, 2 now`."""
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
