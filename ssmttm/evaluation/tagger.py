"""KL divergence between what an audio tagger hears in generated and in reference clips of the same captions.

As stable-audio-metrics computes it (src/passt_kld.py there): logits averaged over windows that overlap by half, a
softmax over the classes, KL(generated || reference) with 1e-6 added to the reference, averaged over the pairs. AudioSet
taggers are trained with a sigmoid a class; the softmax makes one distribution of them and is part of the metric's name.
Clips are not brought to one loudness first, as they are there. MusicGen's `kld` (audiocraft/metrics/kld.py) is the
divergence the other way round, KL(reference || generated). Both of them use PaSST, this the Audio Spectrogram
Transformer, whose numbers are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssmttm.codec.base import Audio
from ssmttm.evaluation.measure import Arrays, Scores, resampled, windows
from ssmttm.evaluation.weights import judge_fingerprint, judge_folder, load_judge

FILES = "preprocessor_config.json"
MODEL_TYPE = "audio-spectrogram-transformer"
_AT_ONCE = 16
"""Windows the model takes at once."""
_FRAMES_PER_SECOND = 100
"""Of the spectrograms that AST's extractor makes."""


class AstTagger:
    """An AST classifier by name on the hub or by folder; raises InputError without it."""

    def __init__(self, name: str, memory: Path, device: str = "cpu") -> None:
        self.folder = judge_folder(name, "--tagger", MODEL_TYPE, FILES)
        self.fingerprint = judge_fingerprint(memory, self.folder)
        self.device = device

    @property
    def key(self) -> str:
        """ast- and eight digits of the fingerprint."""
        return f"ast-{self.fingerprint[:8]}"

    def metrics(self, *, paired: bool) -> tuple[str, ...]:
        """The divergence, of pairs alone."""
        return (f"kl_softmax_{self.key}",) if paired else ()

    def rows(self, clips: Sequence[Audio], sample_rate: int) -> Arrays:
        """Each clip's logits (classes,), the mean over its windows."""
        import torch

        extractor, model = self._loaded
        length = extractor.max_length * extractor.sampling_rate // _FRAMES_PER_SECOND
        cut = [windows(resampled(clip, sample_rate, extractor.sampling_rate), length) for clip in clips]
        flat = [window for each in cut for window in each]
        parts = []
        for start in range(0, len(flat), _AT_ONCE):
            inputs = extractor(
                flat[start : start + _AT_ONCE], sampling_rate=extractor.sampling_rate, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = model(input_values=inputs["input_values"].float().to(self.device)).logits
            parts.append(np.asarray(logits.float().cpu()))
        seen = np.split(np.concatenate(parts), np.cumsum([len(each) for each in cut])[:-1])
        return {"logits": np.stack([each.mean(axis=0) for each in seen])}

    def score(self, generated: Arrays, reference: Arrays, captions: Sequence[str], *, paired: bool) -> Scores:  # noqa: ARG002
        """The mean divergence over the pairs."""
        (name,) = self.metrics(paired=paired)
        return Scores({name: kl_softmax(generated["logits"], reference["logits"])})

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, extractor = load_judge(
            self.folder, "ASTForAudioClassification", self.device, "ASTFeatureExtractor"
        )
        return extractor, model


def kl_softmax(generated: np.ndarray, reference: np.ndarray) -> float:
    """Mean KL(generated || reference) in nats of the softmax over logits (clips, classes), row by row."""
    p, q = _softmax(generated), _softmax(reference)
    # p log p is 0 where p is.
    return float(
        (p * (np.log(np.maximum(p, np.finfo(np.float64).tiny)) - np.log(q + 1e-6))).sum(axis=1).mean()
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
