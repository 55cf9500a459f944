"""KL divergence between an audio tagger's classes for generated and for reference clips of the same captions.

As in stable-audio-metrics (src/passt_kld.py there): logits averaged over windows that overlap by half, a softmax over
the classes, KL(generated || reference) with 1e-6 added to the reference, averaged over the pairs. AudioSet taggers are
trained with a sigmoid for each class; the softmax makes one distribution of them and is part of the metric's name.
Unlike there, clips are not brought to one loudness first. MusicGen's `kld` (audiocraft/metrics/kld.py) is the reverse
divergence, KL(reference || generated). Both of them use PaSST, this module the Audio Spectrogram Transformer, whose
numbers differ.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax

from ssmttm.codec.base import Audio
from ssmttm.evaluation.measure import Arrays, Scores
from ssmttm.evaluation.weights import Judge


class AstTagger(Judge):
    """An AST classifier."""

    option, prefix, model_type = "--tagger", "ast", "audio-spectrogram-transformer"
    files = "preprocessor_config.json"
    classes = ("ASTForAudioClassification", "ASTFeatureExtractor")

    @property
    def metrics(self) -> tuple[str]:
        """Name of the divergence."""
        return (f"kl_softmax_{self.key}",)

    def rows(self, clips: Sequence[Audio], sample_rate: int) -> Arrays:
        """Return each clip's logits (classes,), the mean over its windows."""
        model, extractor = self.loaded

        def logits(inputs: Any) -> np.ndarray:
            values = inputs["input_values"].float().to(self.device)
            return np.asarray(model(input_values=values).logits.float().cpu())

        length = extractor.max_length * extractor.sampling_rate // 100  # AST has 100 frames a second
        return {"logits": self.over_windows(clips, sample_rate, extractor, length, logits)}

    def score(self, generated: Arrays, reference: Arrays, captions: Sequence[str]) -> Scores:  # noqa: ARG002
        """Return the mean divergence over the pairs of a generated and a reference clip."""
        return Scores({self.metrics[0]: kl_softmax(generated["logits"], reference["logits"])})


def kl_softmax(generated: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean KL(generated || reference) in nats of the softmax over logits (clips, classes), row by row."""
    p, q = (softmax(logits.astype(np.float64), axis=1) for logits in (generated, reference))
    log_p = np.log(np.maximum(p, np.finfo(np.float64).tiny))  # p log p is 0 where p is 0
    return float((p * (log_p - np.log(q + 1e-6))).sum(axis=1).mean())
