"""Models that judge music: their weights come from the hub or from a folder, since no package ships them."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ssmttm.codec.base import Audio
from ssmttm.compat import tame_torchaudio
from ssmttm.errors import InputError
from ssmttm.evaluation.measure import resampled, windows
from ssmttm.pretrained import CONFIG, pretrained_folder, read_config
from ssmttm.text.encoder_files import ENCODER_FILES, files_fingerprint

AT_ONCE = 16
"""Windows or captions that a model takes at once."""


class Judge:
    """A model of transformers by a name on the hub or by a folder; raises InputError if its files are missing."""

    option: ClassVar[str]
    """Option of the command line that names the model."""
    prefix: ClassVar[str]
    """First part of the key."""
    model_type: ClassVar[str]
    """Required entry of config.json."""
    files: ClassVar[str]
    """Names of the files it needs beside configuration and weights."""
    classes: ClassVar[tuple[str, str]]
    """transformers' classes of the network and of its processor."""

    def __init__(self, name: str, memory: Path, device: str = "cpu") -> None:
        """Find the model's files; `memory` is a folder that keeps the hashes of large files."""
        folder = pretrained_folder(
            name, self.option, ENCODER_FILES, f"{CONFIG}, model.safetensors, {self.files}"
        )
        found = read_config(folder).get("model_type")
        if found != self.model_type:
            raise InputError(
                f"{self.option} {name}: {folder / CONFIG}: model_type is {found!r}, not {self.model_type!r}"
            )
        self.folder, self.device = folder, device
        self.fingerprint = files_fingerprint(memory, folder, "judge 1")
        self.key = f"{self.prefix}-{self.fingerprint[:8]}"

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The network in evaluation mode and its processor; raises InputError if a file is damaged."""
        tame_torchaudio()
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()  # a library does not write to the terminal
        model, processor = self.classes
        try:
            network, about = getattr(transformers, model).from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            part = getattr(transformers, processor).from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # each kind of file is read by a library with errors of its own
            raise InputError(f"{self.folder}: cannot be read as a {model}: {error}") from error
        if about["missing_keys"]:
            raise InputError(
                f"{self.folder}: the weights lack {sorted(about['missing_keys'])[0]} and maybe more"
            )
        return network.to(self.device).eval(), part

    def over_windows(
        self,
        clips: Sequence[Audio],
        sample_rate: int,
        extractor: Any,
        length: int,
        judge: Callable[[Any], np.ndarray],
    ) -> np.ndarray:
        """Return the mean of `judge`'s rows over each clip's windows of `length` samples, (clips, ...).

        judge: takes the extractor's inputs of several windows.
        """
        import torch

        rate = extractor.sampling_rate
        cut = [windows(resampled(clip, sample_rate, rate), length) for clip in clips]
        flat = [window for each in cut for window in each]
        rows = []
        for start in range(0, len(flat), AT_ONCE):
            inputs = extractor(flat[start : start + AT_ONCE], sampling_rate=rate, return_tensors="pt")
            with torch.inference_mode():
                rows.append(judge(inputs))
        by_clip = np.split(np.concatenate(rows), np.cumsum([len(each) for each in cut])[:-1])
        return np.stack([each.mean(axis=0) for each in by_clip])
