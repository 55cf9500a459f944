"""A pretrained neural codec behind the protocol of base.py: batches, long audio in bounded memory, identity, files.

EnCodec and DAC differ in their networks alone (encodec.py, dac.py). Audio is padded with silence to whole hops, so
that n samples have ceil(n / hop) frames, alone or in a batch. On a CPU a batch goes through row by row, which costs
nothing there and gives each clip the same bits as alone.

A codec is saved with its weights, as config.json and model.safetensors in the network's own form: a corpus's codec
folder also serves as the folder of a model.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ssmttm.codec import dac, encodec
from ssmttm.codec.base import CODEC_FILE, Audio, Codes
from ssmttm.codec.facts import CodecFacts
from ssmttm.codec.network import Network
from ssmttm.device import usable_device
from ssmttm.errors import InputError
from ssmttm.files import canonical_json, write_atomically
from ssmttm.pretrained import CONFIG

WEIGHTS = "model.safetensors"

_SAMPLES_AT_ONCE = 4_000_000
"""Samples of a batch on a GPU: 90 s at 44.1 kHz, 13 GB by DAC's use for 5 s on a CPU."""


@dataclass(frozen=True)
class NeuralCodec:
    """A network, of which the first `codebooks` codebooks are used."""

    network: Network
    codebooks: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.codebooks <= self.network.n_codebooks:
            raise InputError(
                f"codebooks is {self.codebooks}, but the {self.network.name} model has {self.network.n_codebooks}"
            )
        self.network.module.to(self.device)

    @classmethod
    def of_model(cls, name: str, model: str | None, codebooks: int, device: str = "cpu") -> Self:
        """Load the codec `name` from a model's folder or name on the hub; None takes the codec's usual model.

        Raises InputError if the model's files are missing or damaged, or if it has fewer codebooks.
        """
        device = usable_device(device)  # before a long download
        load = dac.load_network if name == "dac" else encodec.load_network
        return cls(load(model), codebooks, device)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the weights, the configuration's keys that decide codes, and the number of codebooks."""
        network = self.network
        choices = {"name": network.name, "codebooks": self.codebooks, "arithmetic": network.arithmetic}
        digest = hashlib.sha256(canonical_json(choices).encode())
        for name, tensor in sorted(network.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy(), dtype="<f4").tobytes())
        return digest.hexdigest()

    @property
    def facts(self) -> CodecFacts:
        """Rates, codebooks, entries and fingerprint."""
        network = self.network
        return CodecFacts(
            name=network.name,
            fingerprint=self.fingerprint,
            sample_rate=network.sample_rate,
            frame_rate=network.sample_rate / network.hop,
            n_codebooks=self.codebooks,
            codebook_size=network.codebook_size,
        )

    def encode(self, audio: Audio) -> Codes:
        """Return codes (batch, codebooks, ceil(samples / hop)) of mono audio (batch, samples)."""
        import torch

        batch, samples = audio.shape
        hop = self.network.hop
        frames = -(-samples // hop)
        out = np.zeros((batch, self.codebooks, frames), np.uint16)
        with _inference():
            for rows, part in self._parts(batch, frames):
                piece = audio[rows, part.start * hop : part.end * hop].astype(np.float32)
                padded = np.pad(piece, ((0, 0), (0, (part.end - part.start) * hop - piece.shape[1])))
                codes = self.network.encode(torch.from_numpy(padded).to(self.device), self.codebooks)
                kept = codes.cpu().numpy()[:, :, part.first - part.start : part.last - part.start]
                out[rows, :, part.first : part.last] = kept
        return out

    def decode(self, codes: Codes) -> Audio:
        """Return mono audio (batch, frames x hop) in [-1, 1] of codes (batch, codebooks, frames).

        Raises InputError for codes or codebooks that the model does not have.
        """
        import torch

        size, hop = self.network.codebook_size, self.network.hop
        if codes.size and int(codes.max()) >= size:
            raise InputError(f"code {int(codes.max())} of a codebook of {size} entries")
        batch, books, frames = codes.shape
        if not 1 <= books <= self.network.n_codebooks:
            raise InputError(
                f"{books} codebooks of a {self.network.name} model of {self.network.n_codebooks}"
            )
        out = np.zeros((batch, frames * hop), np.float32)
        with _inference():
            for rows, part in self._parts(batch, frames):
                piece = torch.from_numpy(codes[rows, :, part.start : part.end].astype(np.int64))
                decoded = self.network.decode(piece.to(self.device)).float().cpu().numpy()
                # An odd stride gives a few samples less than whole hops: the last ones stay silent.
                kept = decoded[:, (part.first - part.start) * hop : (part.last - part.start) * hop]
                out[rows, part.first * hop : part.first * hop + kept.shape[1]] = kept
        return np.clip(out, -1.0, 1.0)

    def save(self, folder: Path) -> None:
        """Write model.safetensors, config.json and, last, codec.json."""
        from safetensors.torch import save

        weights = self.network.module.state_dict()
        write_atomically(
            folder / WEIGHTS, save({name: tensor.cpu().contiguous() for name, tensor in weights.items()})
        )
        write_atomically(folder / CONFIG, _json(self.network.config.to_dict()))
        description = {
            "name": self.network.name,
            "fingerprint": self.fingerprint,
            "codebooks": self.codebooks,
        }
        write_atomically(folder / CODEC_FILE, _json(description))

    def _parts(self, batch: int, frames: int) -> Iterator[tuple[slice, "_Part"]]:
        """Yield the rows and the frames that go through the network together."""
        window, context = self.network.window, self.network.context
        samples = max(1, min(frames, window + 2 * context) * self.network.hop)
        together = 1 if self.device == "cpu" else max(1, _SAMPLES_AT_ONCE // samples)
        for row in range(0, batch, together):
            for first in range(0, frames, window):
                last = min(frames, first + window)
                part = _Part(max(0, first - context), first, last, min(frames, last + context))
                yield slice(row, min(batch, row + together)), part


class _Part(NamedTuple):
    """Frames first..last of a signal, for which the network must see start..end."""

    start: int
    first: int
    last: int
    end: int


@contextmanager
def _inference() -> Iterator[None]:
    """Compute without gradients, and on a GPU in float32: TF32, its default, would give other codes."""
    import torch

    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), flags:
        yield


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
