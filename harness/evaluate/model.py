"""A finished run opened for use: its final weights, the corpus whose codec turns its tokens into sound, its text.

Training leaves the whole model's annealed weights as one file of safetensors, whatever the ranks and the ZeRO stage
were; nothing in it can be executed.
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
from ssmttm.corpus.manifest import Manifest, load_manifest
from ssmttm.device import usable_device
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from ssmttm.codec.base import Codec
    from ssmttm.model.music_lm import MusicLM
    from ssmttm.text.text_batch import TextBatch


@dataclass(frozen=True)
class Trained:
    """A finished run with its model."""

    run: Run
    root: Root
    """Its ROOT; `root.text` caches embeddings of its frozen text encoder."""
    model: MusicLM
    """In evaluation mode on a device, with the final weights in float32."""
    corpus: Path
    manifest: Manifest
    """Of the corpus, whose fingerprint is the run's."""
    text_encoder: str | None
    """Folder or hub name of the frozen text encoder; None where the model has its own."""

    def read(self, captions: Sequence[str]) -> TextBatch:
        """Captions as the model reads them; raises InputError where its frozen encoder is gone or another."""
        from ssmttm.text.prompts import FrozenEncoder, read_captions

        encoder = None
        if self.run.text_encoder is not None and self.text_encoder is not None:
            encoder = FrozenEncoder(self.text_encoder, self.run.text_encoder, self.root.text)
        return read_captions(captions, self.run.model.text, encoder)

    @cached_property
    def codec(self) -> Codec:
        """The codec of the corpus; raises InputError where it is missing or is not what made the tokens."""
        from ssmttm.codec.load import load_codec

        codec = load_codec(self.corpus / "codec", self.model.null_condition.device.type)
        if codec.facts.fingerprint != self.manifest.codec.fingerprint:
            raise InputError(
                f"{self.corpus / 'codec'}: is not the codec that made the corpus: it has changed"
            )
        return codec


def load_trained(root: Root, name: str, device: str = "cpu") -> Trained:
    """Open a finished run by its id, the first digits of it, or its directory.

    Raises InputError where there is no such run, where it has not finished, where its weights are not here, or where
    its corpus is gone or another.
    """
    folder = find_run(root, name)
    run, place = read_run(folder), Root(folder.parent.parent)
    if (state := read_progress(folder).state) != Event.FINISHED:
        now = f"its state is {state}" if state else "nothing has trained it yet"
        raise InputError(f"run {run.run_id}: has not finished, {now}; `ssmscale submit` goes on with it")
    launch = read_launch(place, run.series_id)
    return Trained(
        run=run,
        root=place,
        model=_load_model(run, folder / "checkpoints" / "model.safetensors", device),
        corpus=launch.corpus,
        manifest=_its_manifest(run, launch),
        text_encoder=launch.text_encoder,
    )


def find_run(root: Root, name: str) -> Path:
    """The directory of the run that is meant; raises InputError unless there is exactly one."""
    if (Path(name) / "run.json").is_file():
        return Path(name).absolute()
    if not name or not set(name) <= set("0123456789abcdef"):
        raise InputError(f"{name}: neither a run's directory nor a run id, which is 12 hex digits")
    found = sorted(path.parent for path in (root.path / "runs").glob(f"{name}*/run.json"))
    if len(found) != 1:
        raise InputError(f"{name}: begins the id of {len(found)} runs under {root.path / 'runs'}")
    return found[0].absolute()


def _load_model(run: Run, path: Path, device: str) -> MusicLM:
    if not path.is_file():
        raise InputError(
            f"{path}: run {run.run_id} has finished, but its weights are not here (a bundle carries none)"
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
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: not the weights of run {run.run_id} ({first_line(error)})") from None
    return model.to(place).eval()


def _its_manifest(run: Run, launch: Launch) -> Manifest:
    manifest = load_manifest(launch.corpus)
    if manifest.fingerprint != run.corpus:
        raise InputError(f"{launch.corpus}: is not the corpus of run {run.run_id}: its fingerprint differs")
    return manifest
