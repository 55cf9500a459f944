"""Sound files that a finished run generates from captions, each with a JSON file beside it that says how."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.common.disk import write_atomically
from harness.evaluate.model import Trained
from harness.study.run import Frozen
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from ssmttm.generation import Sampling

BATCH = 8
"""Captions generated at once: beyond, memory grows and time hardly shrinks."""
PEAK = 0.99
"""Peak to which audio beyond full scale is brought down."""


class SoundFile(Frozen):
    """One sound file and all that decides it: what lies beside it as JSON."""

    file: str
    run_id: str
    prompt: str
    seed: int
    """Of its own: with it and the prompt alone the same tokens come again."""
    sampling: dict[str, float | int | None]
    frames: int
    seconds: float
    sample_rate: int
    """Hz."""
    scaled_by: float
    """Factor that brought the audio within full scale; 1 where it was."""
    codec: str
    """Fingerprint."""


def frames_of(trained: Trained, seconds: float | None) -> int:
    """Frames of a piece of so many seconds, by default of those the run was trained on.

    Raises InputError for what is no frame, and for more than a model with self-attention was trained on.
    """
    run, rate = trained.run, trained.manifest.codec.frame_rate
    if seconds is None:
        return run.frames
    frames = round(seconds * rate) if 0 < seconds < float("inf") else 0
    if frames < 1:
        raise InputError(f"--seconds {seconds:g}: choose a length of {1 / rate:g} s (one frame) or more")
    if is_longer(trained, frames) and not run.model.architecture.is_recurrent:
        raise InputError(
            f"--seconds {seconds:g}: a {run.model.architecture} knows no positions beyond those it was trained on; "
            f"choose up to {run.frames / rate:g} s"
        )
    return frames


def is_longer(trained: Trained, frames: int) -> bool:
    """True if a piece goes on where training never went."""
    return frames > trained.run.frames


def places(out: Path, pieces: int) -> list[Path]:
    """Paths of the sound files: F.wav; F-0.wav and so on where there are several; 0.wav and so on in a folder."""
    if out.suffix and out.suffix.lower() != ".wav" and not out.is_dir():
        raise InputError(
            f"--out {out}: sound is written as F.wav, or into a folder, whose name has no ending"
        )
    width = len(str(pieces - 1))
    numbers = [f"{piece:0{width}d}" for piece in range(pieces)]
    if out.suffix.lower() != ".wav" or out.is_dir():
        return [out / f"{number}.wav" for number in numbers]
    return [out] if pieces == 1 else [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in numbers]


def write_pieces(
    trained: Trained,
    prompts: Sequence[str],
    files: Sequence[Path],
    frames: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[SoundFile]:
    """Generate, decode and write a piece a prompt, prompt i from the seed `seed` + i; yields each when it is there."""
    import soundfile  # here, where it is missing before anything was generated

    from ssmttm.generation import generate

    facts = trained.codec.facts
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        seeds = range(seed + first, seed + first + len(some))
        codes = generate(trained.model, trained.read(some), frames, sampling, seeds)
        heard = trained.codec.decode(codes.cpu().numpy().astype(np.uint16))
        for prompt, own, audio, path in zip(some, seeds, heard, files[first:], strict=False):
            peak = float(np.abs(audio).max())
            scale = PEAK / peak if peak > 1 else 1.0
            piece = SoundFile(
                file=path.name,
                run_id=trained.run.run_id,
                prompt=prompt,
                seed=own,
                sampling=asdict(sampling),
                frames=frames,
                seconds=len(audio) / facts.sample_rate,
                sample_rate=facts.sample_rate,
                scaled_by=scale,
                codec=facts.fingerprint,
            )
            sound = io.BytesIO()
            soundfile.write(sound, audio * np.float32(scale), facts.sample_rate, "PCM_16", format="WAV")
            beside = path.with_name(f"{path.name}.json")
            beside.unlink(missing_ok=True)  # it tells of the sound that is replaced
            write_atomically(path, sound.getvalue())
            write_atomically(beside, piece.model_dump_json(indent=1) + "\n")
            yield piece
