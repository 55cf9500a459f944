"""Sound files of one Run's prompts by tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.evaluate.generate import BATCH, SoundFile, kept_piece
from harness.evaluate.model import Trained
from harness.evaluate.part import PiecesOrder
from harness.evaluate.sharing import Block, Slice, batch_seconds, blocks_of
from harness.evaluate.tasks import Whole
from harness.plan.cluster import Cluster
from ssmttm.files import canonical_json
from ssmttm.generation import Sampling

FOLDER = "generate"
"""Folder below ROOT with the jobs and parts of each set of pieces."""


@dataclass(frozen=True)
class PieceSet:
    """Pieces to write: a file for each caption."""

    trained: Trained
    captions: Sequence[str]
    files: Sequence[Path]
    frames: int
    sampling: Sampling
    seed: int
    """Seed of the first caption; each further one takes the next."""

    @property
    def places(self) -> dict[str, Path]:
        """Return the paths that tasks need, by the names that the user knows; they write below the first."""
        root = self.trained.root.path
        return {"--out": self.files[0].parent, "--root": root, "corpus.path": self.trained.launch.corpus}

    def kept(self) -> list[SoundFile | None]:
        """Return the piece of each caption, None for those that are not written."""
        run_id, numbers = self.trained.run.run_id, range(self.seed, self.seed + len(self.captions))
        return [
            kept_piece(path, run_id, caption, self.frames, self.sampling, seed)
            for path, caption, seed in zip(self.files, self.captions, numbers, strict=True)
        ]

    def blocks_left(self, cluster: Cluster) -> list[Block]:
        """Return the blocks with pieces that are not written."""
        kept, run = self.kept(), self.trained.run
        guided = 1 if self.sampling.guidance in {0, 1} else 2
        rows = guided * min(BATCH, len(self.captions))
        seconds = batch_seconds(run.model, self.frames, rows, cluster)
        blocks = blocks_of(run.run_id, len(self.captions), BATCH, seconds)
        return [block for block in blocks if not all(kept[number] for number in block.prompts.prompts)]

    def whole(self) -> Whole:
        """Return the set as a work that tasks share."""
        files = [str(path.absolute()) for path in self.files]
        run, facts = (
            self.trained.run,
            [list(self.captions), files, self.frames, asdict(self.sampling), self.seed],
        )
        digest = hashlib.sha256(canonical_json([run.run_id, *facts]).encode()).hexdigest()[:12]
        run_dir = self.trained.root.run(run.run_id).absolute()
        launch = self.trained.launch
        encoder = [] if launch.text_encoder is None else [Path(launch.text_encoder)]
        needs = (launch.corpus, *(path for path in encoder if path.is_absolute()))

        def order(slices: Sequence[Slice]) -> dict[str, object]:
            numbers = [number for one in slices for number in one.prompts]
            return PiecesOrder(
                whole=digest,
                run_dir=run_dir,
                needs=needs,
                slices=tuple(slices),
                captions=tuple(self.captions[number] for number in numbers),
                files=tuple(self.files[number].absolute() for number in numbers),
                frames=self.frames,
                sampling=self.sampling,
                seed=self.seed,
            ).model_dump(mode="json")

        return Whole(self.trained.root.path.absolute() / FOLDER / digest, digest, order)
