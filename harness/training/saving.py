"""When a checkpoint is written, which are kept, and which one training goes on from.

The first rank decides and tells the others. Nothing is saved ahead of the journal, nothing by an attempt that a newer
one has replaced, and whatever is wrong with a checkpoint costs that checkpoint and a line in the journal.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.disk import drop_draft, make_folder, room_for, sync_file, sync_folder
from harness.journal import Event, Journal
from harness.rundir import Launch
from harness.training import checkpoint as checkpoints
from harness.training.checkpoint import TAG, Checkpoint, Problem, tag_of
from harness.training.engine import Engine, Ranks

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

        self.ranks.first_does(clear)

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

        self.ranks.first_does(look)
        found: Checkpoint | None = self.ranks.tell(chosen)
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

        self.ranks.first_does(look)
        if self.ranks.tell(is_there):
            return
        checkpoints.save(engine, folder, step, tokens, branch=branch, loss=loss, before_marking=last_look)
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


def retire(folder: Path, step: int, *, keep_last: int, keep_best: bool) -> None:
    """Drop checkpoints that the one of `step`, whole by now, makes superfluous.

    Branch points stay, the newest `keep_last` others up to `step`, those beyond it, and with `keep_best` the one of the
    lowest held-out loss. What never became whole goes; what has a marker that cannot be read is left alone.
    """
    held = checkpoints.marked(folder)
    others = [found for found in held if not found.marker.branch and found.marker.step <= step]
    kept = {found.tag for found in held if found.marker.branch or found.marker.step > step}
    kept |= {found.tag for found in others[-keep_last:]} | {tag_of(step)}
    if keep_best and (best := _best(held)) is not None:
        kept.add(best.tag)
    for older in folder.glob("step-*"):
        is_one = older.is_dir() and TAG.fullmatch(older.name) and older.name < tag_of(step)
        known = any(found.tag == older.name for found in held)
        if is_one and older.name not in kept and (known or not (folder / f"{older.name}.complete").exists()):
            checkpoints.remove(folder, older.name)


def remove_partial(folder: Path) -> None:
    """Remove what was being saved when its process ended, to make room; for the holder of the Series' lock alone."""
    for path in folder.glob("step-*"):
        endings = (".complete", ".damaged")
        if TAG.fullmatch(path.name) and not any(
            (folder / f"{path.name}{ending}").exists() for ending in endings
        ):
            shutil.rmtree(path, ignore_errors=True)


def _best(held: list[Checkpoint]) -> Checkpoint | None:
    measured = [
        (found.marker.loss, found.marker.step, found) for found in held if found.marker.loss is not None
    ]
    return min(measured, key=lambda entry: entry[:2])[2] if measured else None


def save_weights(weights: dict[str, Any], path: Path) -> None:
    """Write a model's final weights, the old file or the new one being there; raises DiskFull."""
    from safetensors.torch import save_file

    make_folder(path.parent)
    draft = path.with_name(f".{path.name}.draft")
    size = sum(value.numel() * value.element_size() for value in weights.values())
    try:
        with room_for(size, path):
            save_file(weights, draft)
            sync_file(draft)
            draft.replace(path)
            sync_folder(path.parent)
    finally:
        drop_draft(draft)
