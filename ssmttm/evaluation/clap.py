"""CLAP: text and audio in one space (Wu et al. 2023, arXiv 2211.06687), through transformers.

The CLAP score is the mean cosine between a caption's embedding and that of what was generated for it; the Frechet
distance is taken over the audio embeddings alone. A clip longer than the model's input is cut into windows that overlap
by half, and its embedding is the mean of theirs: the model's own ways with long audio draw crops at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssmttm.codec.base import Audio
from ssmttm.evaluation.frechet import Moments, frechet_distance
from ssmttm.evaluation.measure import Arrays, Scores, resampled, windows
from ssmttm.evaluation.weights import judge_fingerprint, judge_folder, load_judge

FILES = "preprocessor_config.json and tokenizer files"
_AT_ONCE = 16
"""Windows or captions the model takes at once."""


class Clap:
    """A CLAP model by name on the hub or by folder, such as laion/larger_clap_music; raises InputError without it."""

    def __init__(self, name: str, memory: Path, device: str = "cpu") -> None:
        self.folder = judge_folder(name, "--clap", "clap", FILES)
        self.fingerprint = judge_fingerprint(memory, self.folder)
        self.device = device

    @property
    def key(self) -> str:
        """clap- and eight digits of the fingerprint."""
        return f"clap-{self.fingerprint[:8]}"

    def metrics(self, *, paired: bool) -> tuple[str, ...]:  # noqa: ARG002  # the score pairs audio with its own caption
        """The distance over audio embeddings, and the score."""
        return f"fd_{self.key}", f"clap_score-{self.fingerprint[:8]}"

    def rows(self, clips: Sequence[Audio], sample_rate: int) -> Arrays:
        """Each clip's embedding (dimensions,), the mean of its windows' unit vectors."""
        import torch

        processor, model = self._loaded
        extractor = processor.feature_extractor
        cut = [
            windows(resampled(clip, sample_rate, extractor.sampling_rate), extractor.nb_max_samples)
            for clip in clips
        ]
        flat = [window for each in cut for window in each]
        parts = []
        for start in range(0, len(flat), _AT_ONCE):
            inputs = extractor(
                flat[start : start + _AT_ONCE],
                sampling_rate=extractor.sampling_rate,
                return_tensors="pt",
            )
            # Where nothing is longer than the input it declares one window, drawn at random, to be.
            longer = torch.zeros(len(inputs["input_features"]), 1, dtype=torch.bool, device=self.device)
            with torch.inference_mode():
                out = model.get_audio_features(
                    input_features=inputs["input_features"].float().to(self.device), is_longer=longer
                )
            parts.append(_vectors(out))
        embedded = np.split(np.concatenate(parts), np.cumsum([len(each) for each in cut])[:-1])
        return {"embedding": np.stack([each.mean(axis=0) for each in embedded])}

    def score(self, generated: Arrays, reference: Arrays, captions: Sequence[str], *, paired: bool) -> Scores:
        """Frechet distance and CLAP score."""
        audio = np.asarray(generated["embedding"], dtype=np.float64)
        one, other = Moments.of(audio), Moments.of(np.asarray(reference["embedding"], dtype=np.float64))
        text = self.text(captions)
        cosines = (audio * text).sum(axis=1) / np.linalg.norm(audio, axis=1) / np.linalg.norm(text, axis=1)
        distance, score = self.metrics(paired=paired)
        notes = []
        if one.is_singular or other.is_singular:
            fewest, wide = min(one.n, other.n), len(one.mean)
            notes.append(
                f"{distance}: {fewest} clips for {wide} dimensions: biased upwards, comparable only at equal numbers"
            )
        return Scores({distance: frechet_distance(one, other), score: float(cosines.mean())}, notes)

    def text(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings (captions, dimensions) of captions, cut to what the text encoder reads."""
        import torch

        processor, model = self._loaded
        limit = model.config.text_config.max_position_embeddings - 2  # RoBERTa's positions begin at 2
        parts = []
        for start in range(0, len(captions), _AT_ONCE):
            inputs = processor.tokenizer(
                list(captions[start : start + _AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                out = model.get_text_features(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
                )
            parts.append(_vectors(out))
        return np.concatenate(parts).astype(np.float64)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, processor = load_judge(self.folder, "ClapModel", self.device, "ClapProcessor")
        return processor, model


def _vectors(out: Any) -> np.ndarray:
    return np.asarray(out.pooler_output.float().cpu())
