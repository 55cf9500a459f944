"""The tensors of each step, micro-batch and rank, and those of the held-out split.

A global batch is a function of (seed, step) alone and is dealt to micro-batches and ranks, so that the experiment is
the same on all resources. The loss of a step is a mean over the targets of the global batch: each micro-batch
contributes its sum divided by that count, which every rank computes by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
Ints = npt.NDArray[np.int64]
ReadCaptions = Callable[[Sequence[str], Bools], "TextBatch"]
"""Makes one batch of text; the flags (batch,) mark captions to replace by the null condition."""


class MicroBatch(NamedTuple):
    """The samples that one rank passes through the model at once."""

    inputs: torch.Tensor
    """(batch, codebooks, steps) int64, delayed."""
    targets: torch.Tensor
    """(batch, codebooks, steps) int64, -100 where the model predicts nothing."""
    text: TextBatch

    def to(self, device: str) -> MicroBatch:
        """Return it on a device."""
        return MicroBatch(self.inputs.to(device), self.targets.to(device), self.text.to(device))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return its tensors, as many as `of` takes."""
        return self.inputs, self.targets, self.text.values, self.text.mask, self.text.dropped

    @classmethod
    def of(cls, inputs: torch.Tensor, targets: torch.Tensor, *text: torch.Tensor) -> MicroBatch:
        """Return the micro-batch of these tensors."""
        from ssmttm.text.text_batch import TextBatch

        return cls(inputs, targets, TextBatch(*text))


class StepBatch(NamedTuple):
    """The samples that one rank trains in one step."""

    micro_batches: Sequence[MicroBatch]
    n_targets: int
    """Number of targets in the global batch, of all ranks."""


class Batches:
    """The training and held-out batches of a Run on a layout."""

    def __init__(
        self, run: Run, launch: Launch, layout: Layout, rank: int, device: str, text_root: Path
    ) -> None:
        self.run, self.layout, self.rank, self.device = run, layout, rank, device
        self.train = TokenDataset(launch.corpus, "train")
        self.valid = TokenDataset(launch.corpus, "valid")
        if self.train.manifest.fingerprint != run.corpus:
            raise InputError(f"{launch.corpus}: not the corpus of run {run.run_id}: its fingerprint differs")
        if len(self.train) == 0 or len(self.valid) == 0:
            raise InputError(f"{launch.corpus}: the train and valid splits must both have clips")
        self.captions = _captions(run, launch, (self.train, self.valid), text_root)

    @cached_property
    def flops_per_token(self) -> float:
        """Training FLOPs per token at this corpus's mean caption length."""
        sample = self.train.captions(np.arange(min(len(self.train), 512)))
        positions = mean_text_positions(self.run.model.text, sample)
        return training_flops(self.run.model, self.run.frames, positions) / self.run.model.n_codebooks

    def training_step(self, step: int) -> StepBatch:
        """Return this rank's samples of a step, on the host."""
        import torch

        run, layout = self.run, self.layout
        indices = batch_indices(len(self.train), run.seed, step, run.batch)
        clip_lengths = self.train.lengths(indices)
        lengths = np.minimum(clip_lengths, run.frames)
        starts = crop_starts(run.seed, step, np.maximum(clip_lengths - run.frames, 0))
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
            lost = torch.from_numpy(np.ascontiguousarray(masked[here, n_positions - width :]))
            micro_batches.append(batch._replace(text=batch.text.without(lost)))
        return StepBatch(micro_batches, int(lengths.sum()) * run.model.n_codebooks)

    def held_out(self) -> Iterator[MicroBatch]:
        """Yield this rank's share of the held-out clips on its device, equally many batches on every rank.

        The last may be empty.
        """
        n_clips = min(len(self.valid), self.run.eval_clips or len(self.valid))
        size = self.layout.micro_batch
        rounds = -(-n_clips // (size * self.layout.ranks))
        for turn in range(rounds):
            first = (turn * self.layout.ranks + self.rank) * size
            indices = np.arange(first, first + size)
            real = indices < n_clips
            indices = np.where(real, indices, 0)
            lengths = np.where(real, np.minimum(self.valid.lengths(indices), self.run.frames), 0)
            whole, kept = np.zeros_like(indices), np.zeros(size, dtype=bool)
            yield self._micro_batch(self.valid, indices, whole, lengths, kept).to(self.device)

    def _micro_batch(
        self, dataset: TokenDataset, indices: Ints, starts: Ints, lengths: Ints, dropped: Bools
    ) -> MicroBatch:
        import torch

        from ssmttm.model.patterns import delay

        whole = dataset.codes(indices)
        window = starts[:, None, None] + np.arange(self.run.frames)
        codes = torch.from_numpy(np.take_along_axis(whole, window, axis=2))
        inputs, targets = delay(codes, torch.from_numpy(lengths), self.run.model.special)
        return MicroBatch(inputs, targets, self.captions(dataset.captions(indices), dropped))


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's dropout: a function of the step, so that resuming needs no random state.

    Dropout also depends on the layout, since the micro-batches of a rank draw one after the other.
    """
    return int.from_bytes(hashlib.sha256(f"dropout/{seed}/{step}/{rank}".encode()).digest()[:7], "big")


def seed_dropout(seed: int, device: str) -> None:
    """Seed the generators that draw dropout on a device.

    torch.manual_seed seeds all devices, and where CUDA is not in use it notes the caller's stack for each: 0.5 ms.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(seed)


def _captions(run: Run, launch: Launch, datasets: Sequence[TokenDataset], text_root: Path) -> ReadCaptions:
    from ssmttm.text.byte_encoder import collate_bytes
    from ssmttm.text.prompts import FrozenEncoder

    if run.model.text.encoder == "bytes":
        return lambda captions, dropped: collate_bytes(captions, dropped, run.model.text)
    if launch.text_encoder is None or run.text_encoder is None:
        raise InputError(
            f"run {run.run_id}: launch.json names no frozen text encoder; submit the study again"
        )
    captions = sorted({caption for data in datasets for caption in data.captions(np.arange(len(data)))})
    encoder = FrozenEncoder(launch.text_encoder, run.text_encoder, text_root)
    return encoder.embeddings(captions, run.model.text.max_positions).batch
