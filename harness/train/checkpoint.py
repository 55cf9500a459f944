"""When a checkpoint is written, which are kept, and which one training goes on from.

The first rank decides and tells the others. Nothing is saved ahead of the journal, nothing by an attempt that a newer
one has replaced, and whatever is wrong with a checkpoint costs that checkpoint and a line in the journal.

Going on on another number of ranks: a ZeRO checkpoint is first turned into one that any number can read.

DeepSpeed's own converter runs in a process of its own, on files that were looked through before. What it makes is
used once and removed; the checkpoint itself stays as it was written.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.common.disk import (
    DiskFull,
    drop_draft,
    make_folder,
    space_for,
    sync_to_disk,
    write_atomically,
)
from harness.record import checkpoints
from harness.record.checkpoints import (
    Checkpoint,
    FileFacts,
    Marker,
    Problem,
    remove_partial,
    retire,
    tag_of,
)
from harness.record.journal import Event, Journal
from harness.record.root import Launch
from harness.train.engine import Engine
from harness.train.ranks import Ranks
from ssmttm.files import sha256_file


def save(
    engine: Engine,
    folder: Path,
    step: int,
    tokens: int,
    *,
    branch: bool = False,
    loss: float | None = None,
    before_marking: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint from all ranks together and mark it complete; collective.

    `before_marking` is called on the first rank when all is on the disk: what it raises leaves the tag unmarked, and is
    raised on every rank. Raises DiskFull where there is no room; what was written of the tag is then gone again.
    """
    import torch

    tag, ranks, needed = tag_of(step), engine.ranks, engine.checkpoint_bytes

    def prepare() -> None:
        make_folder(folder)
        for ending in (".complete", ".damaged"):
            (folder / f"{tag}{ending}").unlink(missing_ok=True)
        shutil.rmtree(folder / tag, ignore_errors=True)
        with space_for(needed, folder / tag):
            pass  # asked by one rank for all: alone, none of them may leave

    def mark() -> None:
        files = {}
        for path in sorted((folder / tag).rglob("*")):
            if path.is_file():
                sync_to_disk(path)
                facts = FileFacts(bytes=path.stat().st_size, sha256=sha256_file(path))
                files[path.relative_to(folder / tag).as_posix()] = facts
        sync_to_disk(folder / tag)
        sync_to_disk(folder)
        before_marking()
        marker = Marker(
            step=step,
            tokens=tokens,
            ranks=ranks.world,
            zero_stage=engine.layout.zero_stage,
            branch=branch,
            loss=loss,
            files=files,
        )
        write_atomically(folder / f"{tag}.complete", marker.sealed().model_dump_json(indent=1) + "\n")

    try:
        ranks.run_on_first(prepare)
        with space_for(needed, folder / tag):
            engine.save_checkpoint(folder, tag)
        torch.distributed.barrier()
        ranks.run_on_first(mark)
    except DiskFull:
        shutil.rmtree(folder / tag, ignore_errors=True)
        raise


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put an engine back to where a checkpoint was made; collective. Random state is a function of the step.

    Under ZeRO a rank's file holds its share: another number of ranks goes through a universal checkpoint.
    """
    if checkpoint.marker.zero_stage and checkpoint.marker.ranks != engine.ranks.world:
        load_universal(engine, checkpoint)
        return
    path, _ = engine.deepspeed.load_checkpoint(str(checkpoint.folder), tag=checkpoint.tag)
    if path is None:
        raise RuntimeError(f"{checkpoint.path}: DeepSpeed loaded nothing from it")


log = logging.getLogger("ssmscale.worker")


class Saver:
    """Saves and finds the checkpoints of one Series and its Runs; collective throughout."""

    def __init__(self, ranks: Ranks, launch: Launch) -> None:
        self.ranks, self.launch = ranks, launch
        self._whole: tuple[Path, int] | None = None
        """Folder and step of the checkpoint that was saved or looked through last."""
        self._passed_over: set[str] = set()

    def clear(self, folders: Sequence[Path]) -> None:
        """Remove what earlier attempts left half written; the Series' lock must be held."""

        def clear() -> None:
            for folder in folders:
                remove_partial(folder)

        self.ranks.run_on_first(clear)

    def find(self, folder: Path, lowest: int, highest: int, journal: Journal | None) -> Checkpoint | None:
        """The newest good checkpoint with lowest <= step <= highest; what is wrong with others is journalled."""
        chosen: Checkpoint | None = None

        def look() -> None:
            nonlocal chosen
            held, problems = checkpoints.survey(folder)
            for problem in problems:
                self._pass_over(problem, journal)
            for found in reversed(held):
                if not lowest <= found.marker.step <= highest:
                    continue
                if (wrong := checkpoints.inspect(found)) is None:
                    chosen = found
                    return
                self._pass_over(wrong, journal)

        self.ranks.run_on_first(look)
        found: Checkpoint | None = self.ranks.broadcast(chosen)
        if found is not None:
            self._whole = folder, found.marker.step
        return found

    def save(
        self,
        engine: Engine,
        folder: Path,
        step: int,
        tokens: int,
        journal: Journal | None,
        *,
        branch: bool,
        loss: float | None,
    ) -> None:
        """Save, unless a good checkpoint of that step is there, and drop what that makes superfluous.

        Raises Fenced and DiskFull, on every rank; neither leaves a tag that counts.
        """
        is_there, begun = False, time.monotonic()

        def look() -> None:
            nonlocal is_there
            verified = self._whole == (folder, step)
            last_look()
            is_there = checkpoints.keep(folder, step, branch=branch, verified=verified)

        def last_look() -> None:
            if journal is not None:
                journal.sync()  # what is resumed from must not be ahead of its record
                journal.check_fence()

        self.ranks.run_on_first(look)
        if self.ranks.broadcast(is_there):
            return
        save(engine, folder, step, tokens, branch=branch, loss=loss, before_marking=last_look)
        self._whole = folder, step
        if journal is not None:
            retire(folder, step, keep_last=self.launch.keep_last, keep_best=self.launch.keep_best)
            journal.append(Event.CHECKPOINT, step=step, seconds=round(time.monotonic() - begun, 3))

    def _pass_over(self, problem: Problem, journal: Journal | None) -> None:
        """Say once an attempt what is wrong with a checkpoint, and take its marker where it is known to be damaged."""
        if problem.damaged is not None:
            checkpoints.condemn(problem.damaged)
        if problem.text not in self._passed_over:
            self._passed_over.add(problem.text)
            log.warning("checkpoint passed over: %s", problem.text)
            if journal is not None:
                journal.append(Event.WARNING, text=f"checkpoint passed over: {problem.text}")


def save_weights(weights: dict[str, Any], path: Path) -> None:
    """Write a model's final weights, the old file or the new one being there; raises DiskFull."""
    from safetensors.torch import save_file

    make_folder(path.parent)
    draft = path.with_name(f".{path.name}.draft")
    size = sum(value.numel() * value.element_size() for value in weights.values())
    try:
        with space_for(size, path):
            save_file(weights, draft)
            sync_to_disk(draft)
            draft.replace(path)
            sync_to_disk(path.parent)
    finally:
        drop_draft(draft)


def load_universal(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put an engine back to a checkpoint that another number of ranks wrote under the same ZeRO stage; collective.

    Raises RuntimeError with the converter's last line where it fails.
    """
    target = checkpoint.folder / f"universal-{checkpoint.tag}"

    def convert() -> None:
        shutil.rmtree(target, ignore_errors=True)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "deepspeed.checkpoint.ds_to_universal",
                "--inject_missing_state",
                "--num_extract_workers=1",
                "--num_merge_workers=1",
                f"--input_folder={checkpoint.path}",
                f"--output_folder={target}",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{checkpoint.path}: {done.stderr.strip().splitlines()[-1]}")

    try:
        engine.ranks.run_on_first(convert)
        engine.load_universal(checkpoint.folder, target.name)
    finally:
        engine.ranks.run_on_first(lambda: shutil.rmtree(target, ignore_errors=True))
