"""Checkpoints: when one is written, which ones are kept, and which one training resumes from.

The first rank decides and broadcasts its decision. No checkpoint is ahead of its journal, and an attempt that a newer
one has replaced saves none. A damaged checkpoint costs that checkpoint and a warning in the journal.

To resume a ZeRO checkpoint on another number of ranks, DeepSpeed's converter, a process of its own, makes a copy that
any number can read. The copy is used once and removed.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.common.disk import (
    DiskFull,
    check_inside,
    drop_draft,
    make_folder,
    size_of,
    space_for,
    sync_to_disk,
)
from harness.record import checkpoints
from harness.record.checkpoints import Checkpoint, FileFacts, Marker, Problem, retire, tag_of
from harness.record.heartbeat import Heartbeat, written_bytes
from harness.record.journal import Event, Journal
from harness.record.root import Launch, write_model
from harness.train.engine import Engine
from harness.train.ranks import Ranks
from ssmttm.files import new_mode, sha256_file

log = logging.getLogger("ssmscale.worker")


def save(
    engine: Engine, folder: Path, marker: Marker, heartbeat: Heartbeat, before_marking: Callable[[], None]
) -> None:
    """Write a checkpoint from all ranks together and its marker with the files it lists; collective.

    The first rank calls `before_marking` once all files are on the disk. An exception there leaves the tag unmarked and
    is raised on every rank. Raises DiskFull after removing the files written so far.
    """
    import torch

    tag, ranks, needed = tag_of(marker.step), engine.ranks, engine.checkpoint_bytes

    def prepare() -> None:
        make_folder(folder)
        checkpoints.remove(folder, tag)
        with space_for(needed, folder / tag):
            pass  # one rank checks for all, since none may leave the others waiting

    def mark() -> None:
        files = {}
        for path in sorted((folder / tag).rglob("*")):
            if path.is_file():
                sync_to_disk(path)
                heartbeat.go_on()
                facts = FileFacts(bytes=path.stat().st_size, sha256=sha256_file(path))
                files[path.relative_to(folder / tag).as_posix()] = facts
                heartbeat.go_on()
        sync_to_disk(folder / tag)
        sync_to_disk(folder)
        before_marking()
        write_model(folder / f"{tag}.complete", marker.sealed(files=files))

    try:
        ranks.run_on_first(prepare)
        with space_for(needed, folder / tag), heartbeat.counting(written_bytes):
            engine.deepspeed.save_checkpoint(
                str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=False
            )
        torch.distributed.barrier()
        ranks.run_on_first(mark)
    except DiskFull:
        shutil.rmtree(folder / tag, ignore_errors=True)
        raise


def load(engine: Engine, checkpoint: Checkpoint, heartbeat: Heartbeat) -> None:
    """Restore an engine from a checkpoint; collective. Random state is a function of the step.

    Under ZeRO each rank's file holds its share, so another number of ranks needs a universal checkpoint.
    """
    if checkpoint.marker.zero_stage and checkpoint.marker.ranks != engine.ranks.world:
        _load_on_other_ranks(engine, checkpoint, heartbeat)
    else:
        engine.load(checkpoint.folder, checkpoint.tag)


class Saver:
    """Saves and finds the checkpoints of one Series and its Runs; every method is collective."""

    def __init__(self, ranks: Ranks, launch: Launch, heartbeat: Heartbeat) -> None:
        self.ranks, self.launch, self.heartbeat = ranks, launch, heartbeat
        self._verified: tuple[Path, int] | None = None
        """Folder and step of the checkpoint saved or verified last."""
        self._passed_over: set[str] = set()

    def find(self, folder: Path, lowest: int, highest: int, journal: Journal | None) -> Checkpoint | None:
        """Return the newest good checkpoint with lowest <= step <= highest; report damaged ones in the journal."""

        def look() -> Checkpoint | None:
            held, problems = checkpoints.survey(folder)
            for problem in problems:
                self._pass_over(problem, journal)
            for found in reversed(held):
                if lowest <= found.marker.step <= highest:
                    if (wrong := checkpoints.inspect(found, self.heartbeat.go_on)) is None:
                        return found
                    self._pass_over(wrong, journal)
            return None

        found = self.ranks.run_on_first(look, Checkpoint | None)
        if found is not None:
            self._verified = folder, found.marker.step
        return found

    def save(self, engine: Engine, folder: Path, marker: Marker, journal: Journal | None) -> None:
        """Save a checkpoint unless a good one of that step exists, and remove those it makes superfluous.

        Raises Fenced and DiskFull on every rank; neither leaves a complete tag.
        """
        begun, step = time.monotonic(), marker.step

        def exists() -> bool:
            check_journal()
            verified = self._verified == (folder, step)
            return checkpoints.keep(folder, step, branch=marker.branch, verified=verified)

        def check_journal() -> None:
            if journal is not None:
                journal.sync()  # a checkpoint must not be ahead of its journal
                journal.check_fence()

        if self.ranks.run_on_first(exists, bool):
            return
        save(engine, folder, marker, self.heartbeat, check_journal)
        self._verified = folder, step
        if journal is not None:
            retire(folder, step, keep_last=self.launch.keep_last, keep_best=self.launch.keep_best)
            journal.append(Event.CHECKPOINT, step=step, seconds=round(time.monotonic() - begun, 3))

    def refuse(self, loaded: Checkpoint, journal: Journal | None) -> None:
        """Invalidate a checkpoint that was loaded and holds values that are not finite; report it in the journal."""
        problem = Problem(f"{loaded.path}: holds a weight or a moment that is not finite", loaded)
        self.ranks.run_on_first(lambda: self._pass_over(problem, journal))

    def _pass_over(self, problem: Problem, journal: Journal | None) -> None:
        """Report a problem once an attempt, and invalidate the marker if the checkpoint is damaged."""
        if problem.damaged is not None:
            checkpoints.condemn(problem.damaged)
        if problem.text not in self._passed_over:
            self._passed_over.add(problem.text)
            log.warning("checkpoint passed over: %s", problem.text)
            if journal is not None:
                journal.append(Event.WARNING, text=f"checkpoint passed over: {problem.text}")


def save_weights(weights: dict[str, Any], path: Path) -> None:
    """Write a model's final weights atomically; raises DiskFull."""
    from safetensors.torch import save_file

    make_folder(path.parent)
    draft = path.with_name(f".{path.name}.draft")
    size = sum(value.numel() * value.element_size() for value in weights.values())
    try:
        with space_for(size, path):
            save_file(weights, draft)
            draft.chmod(new_mode(path.parent))  # safetensors makes a file for its owner alone
            sync_to_disk(draft)
            draft.replace(path)
            sync_to_disk(path.parent)
    finally:
        drop_draft(draft)


def _load_on_other_ranks(engine: Engine, checkpoint: Checkpoint, heartbeat: Heartbeat) -> None:
    """Convert and load a checkpoint of another number of ranks; raises RuntimeError with the converter's last line."""
    target = checkpoint.folder / f"universal-{checkpoint.tag}"

    def remove_converted() -> None:
        check_inside(target.parents[2], target)
        shutil.rmtree(target, ignore_errors=True)

    def make() -> None:
        remove_converted()
        done = subprocess.run(
            [
                *(sys.executable, "-c", f"from {__name__} import convert; convert()"),
                *("--inject_missing_state", "--num_extract_workers=1", "--num_merge_workers=1"),
                *(f"--input_folder={checkpoint.path}", f"--output_folder={target}"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{checkpoint.path}: {done.stderr.strip().splitlines()[-1]}")

    try:
        with heartbeat.counting(lambda: size_of(target)):
            engine.ranks.run_on_first(make)
        engine.load_universal(checkpoint.folder, target.name)
    finally:
        engine.ranks.run_on_first(remove_converted)


def convert() -> None:
    """Run DeepSpeed's converter, with its options from the command line, without its unpickling."""
    from deepspeed.checkpoint.ds_to_universal import main, parse_arguments

    from ssmttm.compat import pickle_zero_stages_by_value

    pickle_zero_stages_by_value()
    with checkpoints.loading_safely():
        main(parse_arguments())
