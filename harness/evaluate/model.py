"""A finished run loaded for use: its final weights, its corpus with the codec, and its text encoder.

Training writes the whole model's final weights as one safetensors file, for every number of ranks and ZeRO stage;
loading it executes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from harness.common.validation import first_line
from harness.record.journal import Event, read_progress
from harness.record.root import Launch, Root, read_launch, read_run
from harness.study.run import Run
from harness.train.kernel_choices import keep_choices
from ssmttm.codec.base import Codec
from ssmttm.codec.load import load_codec
from ssmttm.corpus.manifest import Manifest, load_manifest
from ssmttm.device import usable_device
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from ssmttm.model.music_lm import MusicLM
    from ssmttm.text.text_batch import TextBatch


@dataclass(frozen=True)
class Trained:
    """A finished run with its model."""

    run: Run
    root: Root
    """`root.text` caches embeddings of the frozen text encoder."""
    launch: Launch
    """launch.json: it names the corpus and the frozen text encoder."""
    model: MusicLM
    """In evaluation mode, with the final weights in float32."""
    manifest: Manifest
    """Manifest of the corpus; its fingerprint is the run's."""

    def read(self, captions: Sequence[str]) -> TextBatch:
        """Encode captions for the model; raises InputError if its frozen encoder is missing or differs."""
        from ssmttm.text.prompts import FrozenEncoder, read_captions

        encoder = None
        if self.run.text_encoder is not None and self.launch.text_encoder is not None:
            encoder = FrozenEncoder(self.launch.text_encoder, self.run.text_encoder, self.root.text)
        return read_captions(captions, self.run.model.text, encoder)

    @cached_property
    def codec(self) -> Codec:
        """Codec of the corpus; raises InputError if it is missing or did not make the tokens."""
        folder = self.launch.corpus / "codec"
        codec = load_codec(folder, self.model.null_condition.device.type)
        if codec.facts.fingerprint != self.manifest.codec.fingerprint:
            raise InputError(f"{folder}: not the codec that made the corpus")
        return codec


def load_trained(root: Root, name: str, device: str = "cpu") -> Trained:
    """Load a finished run by its id, its first digits, or its directory; raises InputError if a part is missing."""
    folder = _find_run(root, name)
    run, place = read_run(folder), Root(folder.parent.parent)
    if (state := read_progress(folder).state) != Event.FINISHED:
        now = f"its state is {state}" if state else "it has not started"
        raise InputError(f"run {run.run_id} has not finished ({now}); submit its study again")
    launch = read_launch(place, run.series_id)
    manifest = load_manifest(launch.corpus)
    if manifest.fingerprint != run.corpus:
        raise InputError(f"{launch.corpus}: not the corpus of run {run.run_id}: its fingerprint differs")
    model = _load_model(run, folder / "checkpoints" / "model.safetensors", device)
    keep_choices(place, device)
    return Trained(run, place, launch, model, manifest)


def _find_run(root: Root, name: str) -> Path:
    if (Path(name) / "run.json").is_file():
        return Path(name).absolute()
    if not name or not set(name) <= set("0123456789abcdef"):
        raise InputError(f"{name!r} is neither a run's directory nor a run id (12 hex digits)")
    found = [path.parent for path in (root.path / "runs").glob(f"{name}*/run.json")]
    if len(found) != 1:
        runs = root.path / "runs"
        raise InputError(f"{len(found) or 'no'} run ids under {runs} start with {name!r}; give one run's id")
    return found[0].absolute()


def _load_model(run: Run, path: Path, device: str) -> MusicLM:
    if not path.is_file():
        raise InputError(
            f"{path}: the weights of run {run.run_id} are missing (bundles hold none); use the ROOT it trained in"
        )
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ssmttm.model.music_lm import MusicLM

    place = usable_device(device)
    try:
        weights = load_file(path)
        with torch.device("meta"):
            model = MusicLM(run.model)
        model.load_state_dict(weights, assign=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from None
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: not the weights of run {run.run_id} ({first_line(error)})") from None
    return model.to(place).eval()
