"""A pretrained neural codec behind the protocol of base.py: batches, long audio in bounded memory, identity, files.

What differs between EnCodec and DAC is their networks (encodec.py, dac.py); all else is here. Audio is padded with
silence to whole hops, so that n samples have ceil(n / hop) frames, alone or in a batch. On a CPU a batch goes through
row by row, which costs nothing there and gives each clip the bits it has alone.

A codec is saved with its weights, as config.json and model.safetensors in the network's own form: a corpus's codec
folder can be given wherever a model's folder is asked for.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from ssmttm.codec.base import CODEC_FILE, Audio, Codes
from ssmttm.codec.facts import CodecFacts
from ssmttm.codec.network import Network
from ssmttm.device import usable_device
from ssmttm.errors import InputError
from ssmttm.files import canonical_json, write_atomically
from ssmttm.pretrained import CONFIG

WEIGHTS = "model.safetensors"

_SAMPLES_AT_ONCE = 4_000_000
"""Of a batch on a GPU: 90 s at 44.1 kHz, 13 GB by what DAC takes for 5 s on a CPU."""


@dataclass(frozen=True)
class NeuralCodec:
    """A network and how many of its codebooks are used, from the first on."""

    network: Network
    codebooks: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.codebooks <= self.network.n_codebooks:
            raise InputError(
                f"codebooks is {self.codebooks}, but the {self.network.name} model has {self.network.n_codebooks}"
            )
        self.network.module.to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the weights, what of the configuration decides codes, and the codebooks used."""
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
        """Codes (batch, codebooks, ceil(samples / hop)) of mono audio (batch, samples)."""
        import torch

        batch, samples = audio.shape
        hop = self.network.hop
        frames = -(-samples // hop)
        out = np.zeros((batch, self.codebooks, frames), np.uint16)
        with _computing():
            for rows in self._rows(batch, frames):
                for part in _parts(frames, self.network):
                    piece = audio[rows, part.start * hop : part.end * hop].astype(np.float32)
                    padded = np.pad(piece, ((0, 0), (0, (part.end - part.start) * hop - piece.shape[1])))
                    codes = self.network.encode(torch.from_numpy(padded).to(self.device), self.codebooks)
                    kept = codes.cpu().numpy()[:, :, part.first - part.start : part.last - part.start]
                    out[rows, :, part.first : part.last] = kept
        return out

    def decode(self, codes: Codes) -> Audio:
        """Mono audio (batch, frames x hop) in [-1, 1] of codes (batch, codebooks, frames).

        Raises InputError on codes the model has no entries for.
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
        with _computing():
            for rows in self._rows(batch, frames):
                for part in _parts(frames, self.network):
                    piece = torch.from_numpy(codes[rows, :, part.start : part.end].astype(np.int64))
                    heard = self.network.decode(piece.to(self.device)).float().cpu().numpy()
                    # An odd stride makes a few samples less than whole hops: the last ones stay silent.
                    kept = heard[:, (part.first - part.start) * hop : (part.last - part.start) * hop]
                    out[rows, part.first * hop : part.first * hop + kept.shape[1]] = kept
        return np.clip(out, -1.0, 1.0)

    def save(self, folder: Path) -> None:
        """Write codec.json, config.json and model.safetensors, codec.json last."""
        from safetensors.torch import save

        tensors = {
            name: tensor.cpu().contiguous() for name, tensor in self.network.module.state_dict().items()
        }
        write_atomically(folder / WEIGHTS, save(tensors))
        write_atomically(folder / CONFIG, _json(self.network.config))
        description = {
            "name": self.network.name,
            "fingerprint": self.fingerprint,
            "codebooks": self.codebooks,
        }
        write_atomically(folder / CODEC_FILE, _json(description))

    @classmethod
    def of_model(cls, name: str, model: str | None, codebooks: int, device: str = "cpu") -> Self:
        """The codec `name` by a model's folder or name on the hub, or by the codec's usual model.

        Raises InputError where the model cannot be had, or has fewer codebooks.
        """
        device = usable_device(device)  # before a long download
        return cls(_network(name, model), codebooks, device)

    @classmethod
    def load(cls, folder: Path, name: str, device: str = "cpu") -> Self:
        """The codec `name` saved in a folder; raises InputError when it is damaged or has changed."""
        path = folder / CODEC_FILE
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            codebooks, fingerprint = int(description["codebooks"]), description["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a codec this version reads: {error!r}") from None
        codec = cls(_network(name, str(folder)), codebooks, usable_device(device))
        if codec.fingerprint != fingerprint:
            raise InputError(
                f"{folder / WEIGHTS}: does not fit the fingerprint in {CODEC_FILE}: it has changed"
            )
        return codec

    def _rows(self, batch: int, frames: int) -> Iterator[slice]:
        """The rows taken through the network together: one on a CPU, as many as memory allows elsewhere."""
        length = max(1, min(frames, self.network.window + 2 * self.network.context) * self.network.hop)
        together = 1 if self.device == "cpu" else max(1, _SAMPLES_AT_ONCE // length)
        for start in range(0, batch, together):
            yield slice(start, min(batch, start + together))


@contextmanager
def _computing() -> Iterator[None]:
    """Nothing is to be learnt, and a GPU rounds as float32 does: with TF32, its default, codes would be others."""
    import torch

    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), flags:
        yield


def _network(name: str, model: str | None) -> Network:
    if name == "dac":
        from ssmttm.codec import dac

        return dac.load_network(model or dac.DEFAULT_MODEL)
    from ssmttm.codec import encodec

    return encodec.load_network(model or encodec.DEFAULT_MODEL)


@dataclass(frozen=True)
class _Part:
    """Frames first..last of a signal, which need start..end to be seen."""

    start: int
    first: int
    last: int
    end: int


def _parts(frames: int, network: Network) -> Iterator[_Part]:
    for first in range(0, frames, network.window):
        last = min(frames, first + network.window)
        yield _Part(max(0, first - network.context), first, last, min(frames, last + network.context))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
