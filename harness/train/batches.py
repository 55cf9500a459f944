"""From (seed, step) to tensors: what every rank and micro-batch of a step sees, and what is held out.

A global batch is laid out once, as a function of (seed, step) alone, and then dealt to micro-batches and ranks, so
that the experiment is the same whatever the resources. The loss of a step is a mean over the targets of the global
batch: each micro-batch contributes its sum over that count, which every rank knows without asking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from harness.plan.estimate import mean_text_positions
from harness.record.root import Launch, Layout
from harness.study.run import Run
from ssmttm.corpus.dataset import TokenDataset, batch_indices, caption_dropout, crop_starts, position_dropout
from ssmttm.errors import InputError
from ssmttm.model.flops import training_flops

if TYPE_CHECKING:
    import torch

    from ssmttm.text.text_batch import TextBatch

Bools = npt.NDArray[np.bool_]


class Captions(Protocol):
    """Turns captions into what the model reads."""

    def __call__(self, captions: Sequence[str], dropped: Bools) -> TextBatch:
        """The captions as one batch of text; `dropped` (batch,) marks those replaced by the null condition."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank takes through the model at once."""

    inputs: torch.Tensor
    """(batch, codebooks, steps) int64, delayed."""
    targets: torch.Tensor
    """(batch, codebooks, steps) int64, -100 where nothing is to be predicted."""
    text: TextBatch


class Batches:
    """The training and held-out batches of a Run on a layout."""

    def __init__(
        self, run: Run, launch: Launch, layout: Layout, rank: int, device: str, text_root: Path
    ) -> None:
        self.run, self.layout, self.rank, self.device = run, layout, rank, device
        self.train = TokenDataset(launch.corpus, "train")
        self.valid = TokenDataset(launch.corpus, "valid")
        if self.train.manifest.fingerprint != run.corpus:
            raise InputError(
                f"{launch.corpus}: is not the corpus of run {run.run_id}: its fingerprint differs"
            )
        if len(self.train) == 0 or len(self.valid) == 0:
            raise InputError(f"{launch.corpus}: the train and valid splits must both have clips")
        self.captions = _captions(run, launch, (self.train, self.valid), text_root)

    @property
    def flops_per_token(self) -> float:
        """Training operations a token, with captions as long as they are here on average."""
        sample = self.train.captions(np.arange(min(len(self.train), 512)))
        positions = mean_text_positions(self.run.model.text, sample)
        return training_flops(self.run.model, self.run.frames, positions) / self.run.model.n_codebooks

    def training_step(self, step: int) -> tuple[list[MicroBatch], int]:
        """This rank's micro-batches of a step, and the number of targets in the whole global batch."""
        run, layout = self.run, self.layout
        indices = batch_indices(len(self.train), run.seed, step, run.batch)
        starts, lengths = self._crops(step, indices)
        dropped = caption_dropout(run.seed, step, run.batch, run.regularisation.caption_dropout)
        n_positions = run.model.text.max_positions
        masked = position_dropout(run.seed, step, run.batch, n_positions, run.regularisation.position_dropout)
        share = layout.micro_batch * layout.ranks
        micro_batches = []
        for first in range(self.rank * layout.micro_batch, run.batch, share):
            here = slice(first, first + layout.micro_batch)
            batch = self._micro_batch(self.train, indices[here], starts[here], lengths[here], dropped[here])
            width = batch.text.mask.shape[1]
            # Text is padded on the left: a caption's last position is the last column in every batch.
            lost = _tensor(masked[here, n_positions - width :]).to(self.device)
            micro_batches.append(MicroBatch(batch.inputs, batch.targets, batch.text.without(lost)))
        return micro_batches, int(lengths.sum()) * run.model.n_codebooks

    def held_out(self) -> Iterator[MicroBatch]:
        """This rank's share of the held-out clips; every rank gets as many batches, the last ones maybe empty."""
        n_clips = min(len(self.valid), self.run.eval_clips or len(self.valid))
        size = self.layout.micro_batch
        rounds = -(-n_clips // (size * self.layout.ranks))
        for turn in range(rounds):
            first = (turn * self.layout.ranks + self.rank) * size
            indices = np.arange(first, first + size)
            real = indices < n_clips
            indices = np.where(real, indices, 0)
            lengths = np.where(real, np.minimum(self.valid.lengths(indices), self.run.frames), 0)
            yield self._micro_batch(
                self.valid, indices, np.zeros_like(indices), lengths, np.zeros(size, dtype=bool)
            )

    def _crops(
        self, step: int, indices: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        lengths, frames = self.train.lengths(indices), self.run.frames
        spare = np.maximum(lengths - frames, 0)
        return crop_starts(self.run.seed, step, spare), np.minimum(lengths, frames)

    def _micro_batch(
        self,
        dataset: TokenDataset,
        indices: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        dropped: Bools,
    ) -> MicroBatch:
        import torch

        from ssmttm.model.patterns import delay

        whole = dataset.codes(indices)
        window = starts[:, None, None] + np.arange(self.run.frames)
        codes = torch.from_numpy(np.take_along_axis(whole, window, axis=2))
        inputs, targets = delay(codes, torch.from_numpy(lengths), self.run.model.special)
        text = self.captions(dataset.captions(indices), dropped)
        return MicroBatch(inputs.to(self.device), targets.to(self.device), text.to(self.device))


def _tensor(values: Bools) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))


def _captions(run: Run, launch: Launch, datasets: Sequence[TokenDataset], text_root: Path) -> Captions:
    from ssmttm.text.byte_encoder import collate_bytes
    from ssmttm.text.prompts import FrozenEncoder

    if run.model.text.encoder == "bytes":
        return lambda captions, dropped: collate_bytes(captions, dropped, run.model.text)
    if launch.text_encoder is None or run.text_encoder is None:
        raise InputError(f"run {run.run_id}: its frozen text encoder is not named in launch.json")
    captions = sorted({caption for data in datasets for caption in data.captions(np.arange(len(data)))})
    encoder = FrozenEncoder(launch.text_encoder, run.text_encoder, text_root)
    return encoder.embeddings(captions, run.model.text.max_positions).batch
