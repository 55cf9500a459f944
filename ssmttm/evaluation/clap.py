"""CLAP: text and audio in one space (Wu et al. 2023, arXiv 2211.06687), through transformers.

The CLAP score is the mean cosine between the embeddings of a caption and of the audio generated for it; the Frechet
distance uses the audio embeddings alone. A clip longer than the model's input is cut into windows that overlap by half,
and its embedding is the mean of theirs: the model's own treatment of long audio draws random crops.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssmttm.codec.base import Audio
from ssmttm.evaluation.frechet import Moments, frechet_distance
from ssmttm.evaluation.measure import Arrays, Scores
from ssmttm.evaluation.weights import AT_ONCE, Judge


class Clap(Judge):
    """A CLAP model, such as laion/larger_clap_music."""

    option, prefix, model_type = "--clap", "clap", "clap"
    files = "preprocessor_config.json and tokenizer files"
    classes = ("ClapModel", "ClapProcessor")

    @property
    def metrics(self) -> tuple[str, str]:
        """Names of the distance over audio embeddings and of the score."""
        return f"fd_{self.key}", f"clap_score-{self.fingerprint[:8]}"

    def rows(self, clips: Sequence[Audio], sample_rate: int) -> Arrays:
        """Return each clip's embedding (dimensions,), the mean of its windows' unit vectors."""
        import torch

        model, processor = self.loaded

        def embed(inputs: Any) -> np.ndarray:
            features = inputs["input_features"].float().to(self.device)
            # If no window is longer than the input, the extractor marks a random one as longer.
            longer = torch.zeros(len(features), 1, dtype=torch.bool, device=self.device)
            return _vectors(model.get_audio_features(input_features=features, is_longer=longer))

        extractor = processor.feature_extractor
        return {
            "embedding": self.over_windows(clips, sample_rate, extractor, extractor.nb_max_samples, embed)
        }

    def score(self, generated: Arrays, reference: Arrays, captions: Sequence[str]) -> Scores:
        """Return Frechet distance and CLAP score."""
        audio = np.asarray(generated["embedding"], dtype=np.float64)
        one, other = Moments.of(audio), Moments.of(np.asarray(reference["embedding"], dtype=np.float64))
        text = self.text(captions)
        cosines = (audio * text).sum(axis=1) / np.linalg.norm(audio, axis=1) / np.linalg.norm(text, axis=1)
        distance, score = self.metrics
        notes = []
        if one.is_singular or other.is_singular:
            fewest, wide = min(one.n, other.n), len(one.mean)
            notes.append(
                f"{distance}: {fewest} clips for {wide} dimensions: biased upwards, comparable only at equal numbers"
            )
        return Scores({distance: frechet_distance(one, other), score: float(cosines.mean())}, notes)

    def text(self, captions: Sequence[str]) -> np.ndarray:
        """Return embeddings (captions, dimensions) of captions, cut to the length of the text encoder's input."""
        import torch

        model, processor = self.loaded
        limit = model.config.text_config.max_position_embeddings - 2  # RoBERTa's positions begin at 2
        parts = []
        for start in range(0, len(captions), AT_ONCE):
            inputs = processor.tokenizer(
                list(captions[start : start + AT_ONCE]),
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


def _vectors(out: Any) -> np.ndarray:
    return np.asarray(out.pooler_output.float().cpu())
