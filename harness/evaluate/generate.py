"""Sound files that a finished run generates from captions, each with its settings in a JSON file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.common.disk import write_atomically
from harness.evaluate.model import Trained
from harness.record.root import read_model_if_there
from harness.study.run import Frozen
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from ssmttm.generation import Sampling

BATCH = 8
"""Captions generated at once; more take more memory and hardly less time."""
PEAK = 0.99
"""Peak to which audio beyond full scale is scaled."""


class SoundFile(Frozen):
    """One sound file and everything that determines it."""

    file: str
    run_id: str
    prompt: str
    seed: int
    """Seed of this piece alone: with the prompt it gives the same tokens again."""
    sampling: dict[str, float | int | None]
    frames: int
    seconds: float
    sample_rate: int
    """Hz."""
    scaled_by: float
    """Factor that scaled the audio to full scale; 1 if it did not exceed it."""
    codec: str
    """Fingerprint of the codec."""


def frames_of(trained: Trained, seconds: float | None) -> int:
    """Return the frames of a piece, by default of the length of training; raises InputError for a wrong length."""
    run, rate = trained.run, trained.manifest.codec.frame_rate
    if seconds is None:
        return run.frames
    frames = round(seconds * rate) if 0 < seconds < float("inf") else 0
    if frames < 1:
        raise InputError(f"--seconds {seconds:g}: choose a length of {1 / rate:g} s (one frame) or more")
    if frames > run.frames and not run.model.architecture.is_recurrent:
        raise InputError(
            f"--seconds {seconds:g}: a {run.model.architecture} has no positions beyond those it was trained on; "
            f"choose up to {run.frames / rate:g} s"
        )
    return frames


def places(out: Path, pieces: int) -> list[Path]:
    """Return the paths of the sound files: one F.wav; several F-0.wav, F-1.wav, ...; in a folder 0.wav, 1.wav, ..."""
    is_folder = out.is_dir() or not out.suffix
    if not is_folder and out.suffix.lower() != ".wav":
        raise InputError(f"--out {out}: name a .wav file, or a folder (a new one without an ending)")
    width = len(str(pieces - 1))
    numbers = [f"{piece:0{width}d}" for piece in range(pieces)]
    if is_folder:
        return [out / f"{number}.wav" for number in numbers]
    return [out] if pieces == 1 else [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in numbers]


def write_pieces(
    trained: Trained,
    prompts: Sequence[str],
    files: Sequence[Path],
    frames: int,
    sampling: Sampling,
    seed: int,
    *,
    anew: bool = True,
) -> Iterator[SoundFile]:
    """Generate, decode and write one piece per prompt, prompt i with the seed `seed` + i; yield each once written.

    Unless `anew`, pieces that were written with the same settings stay. Prompts are generated in blocks of BATCH from
    the first, so that a process that writes whole blocks of more prompts writes the same files.
    """
    import soundfile  # fails before generation if it is not installed

    from ssmttm.generation import generate

    facts = trained.codec.facts
    for first in range(0, len(prompts), BATCH):
        some, paths = prompts[first : first + BATCH], files[first : first + BATCH]
        seeds = range(seed + first, seed + first + len(some))
        kept = [
            None if anew else kept_piece(path, trained.run.run_id, prompt, frames, sampling, own)
            for path, prompt, own in zip(paths, some, seeds, strict=True)
        ]
        if all(kept):
            yield from filter(None, kept)
            continue
        codes = generate(trained.model, trained.read(some), frames, sampling, seeds)
        heard = trained.codec.decode(codes.cpu().numpy().astype(np.uint16))
        for prompt, own, audio, path, before in zip(some, seeds, heard, paths, kept, strict=True):
            if before is not None:
                yield before
                continue
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
            beside = _beside(path)
            beside.unlink(missing_ok=True)  # it describes the sound that is about to be replaced
            write_atomically(path, sound.getvalue())
            write_atomically(beside, piece.model_dump_json(indent=1) + "\n")
            yield piece


def kept_piece(
    path: Path, run_id: str, prompt: str, frames: int, sampling: Sampling, seed: int
) -> SoundFile | None:
    """Return the piece that a file holds if it was generated with just these settings, else None."""
    if not path.is_file():
        return None
    try:
        held = read_model_if_there(_beside(path), SoundFile)
    except InputError:
        return None
    wanted = (path.name, run_id, prompt, frames, asdict(sampling), seed)
    if held is None or (held.file, held.run_id, held.prompt, held.frames, held.sampling, held.seed) != wanted:
        return None
    return held


def _beside(path: Path) -> Path:
    """Return the path of the JSON file that describes a sound."""
    return path.with_name(f"{path.name}.json")
