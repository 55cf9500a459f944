"""Adding a bundle's Runs to a ROOT: finished Runs here stay unchanged, and new attempts follow those that are here.

The first line of an attempt, which names its process and the time, identifies it. An attempt that is here already is
not added again, unless the bundle's copy continues it: then the longer copy stays. All others are added as newer
attempts, under the lock that a trainer of the Series would hold: a newer attempt fences an older one, and an import
must fence no trainer. A Series in training is left alone as a whole.

Scores are added to the evaluations here metric by metric; where both have a score, the one here stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from harness.archive.check import OpenBundle
from harness.archive.export import whole_lines, without_addresses
from harness.common.disk import make_folder, write_atomically
from harness.record.journal import Event, attempt_file, attempts, read_progress
from harness.record.registry import resolve_registered
from harness.record.root import Root, read_run, write_run, write_series
from harness.record.scores import (
    Evaluation,
    evaluation_folder,
    evaluations_of,
    held_evaluation,
    keep_evaluation,
)
from harness.record.series import untrained
from harness.study.run import Run, by_series
from ssmttm.locks import file_lock


@dataclass
class Imported:
    """The outcome of an import."""

    added: list[str] = field(default_factory=list)
    """Runs that the import finished here."""
    present: list[str] = field(default_factory=list)
    """Runs that were finished here already."""
    busy: list[str] = field(default_factory=list)
    """Series in training here, which were left out."""
    evaluations: int = 0
    """Files of scores that are new here, or gained scores."""
    notes: list[str] = field(default_factory=list)


def merge(bundle: OpenBundle, root: Root) -> Imported:
    """Add a checked bundle to `root`; a repeated import changes nothing.

    Raises InputError, before it writes a file, where a study of that name, a run.json or an evaluation here cannot be
    read.
    """
    done = Imported()
    registered = resolve_registered(root, bundle.contents.study)
    for run in bundle.runs:
        if (root.run(run.run_id) / "run.json").exists():
            read_run(root.run(run.run_id))
        list(evaluations_of(root, run.run_id))
    for series_id, runs in by_series(bundle.runs).items():
        if all(_is_finished(root, run) for run in runs):
            done.present += [run.run_id for run in runs]
        else:
            _merge_series(bundle, root, series_id, runs, done)
    for run_id in (*done.added, *done.present):
        _merge_evaluations(bundle, root, run_id, done)
    present = {*done.added, *done.present}
    if registered is not None:
        if others := len(present - {point.run_id for point in registered.points}):
            done.notes.append(
                f"the study {registered.study.name} registered here stays as it is and does not list {others} of these "
                "runs; submit a study that does to use them"
            )
    elif present:
        here, there = root.study(bundle.contents.study), bundle.unpacked.path
        if (there / "calibration.json").exists():
            write_atomically(here / "calibration.json", (there / "calibration.json").read_bytes())
        write_atomically(here / "study.json", without_addresses((there / "study.json").read_bytes()))
    if done.added:
        root.control(bundle.contents.study).append("imported", runs=done.added)
    return done


def _is_finished(root: Root, run: Run) -> bool:
    return read_progress(root.run(run.run_id)).state == Event.FINISHED


def _merge_series(
    bundle: OpenBundle, root: Root, series_id: str, runs: Sequence[Run], done: Imported
) -> None:
    make_folder(root.series(series_id))
    with untrained(root.series(series_id)) as is_free:
        if not is_free:
            done.busy.append(series_id)
            return
        write_series(root, runs[0])
        _merge_journal(root.series(series_id), bundle.unpacked.series(series_id))
        for run in runs:  # after the trunk: the next import skips finished Runs, trunk included
            if _is_finished(root, run):
                done.present.append(run.run_id)
                continue
            write_run(root, run)
            _merge_journal(root.run(run.run_id), bundle.unpacked.run(run.run_id))
            if _is_finished(root, run):
                done.added.append(run.run_id)
            else:
                journal = root.run(run.run_id)
                done.notes.append(f"{journal}: its own journal has attempts after the one that finished")


def _merge_journal(here: Path, there: Path) -> None:
    """Add the attempts of `there` that are not `here`, as newer ones; the caller holds the Series' lock."""
    known: dict[bytes, Path] = {}
    for attempt in attempts(here):
        path = attempt_file(here, attempt)
        known.setdefault(whole_lines(path).partition(b"\n")[0], path)
    for attempt in attempts(there):
        content = whole_lines(attempt_file(there, attempt))
        copy = known.get(content.partition(b"\n")[0])
        if copy is None:
            write_atomically(attempt_file(here, max(attempts(here), default=0) + 1), content)
        elif content.startswith(own := whole_lines(copy)) and content != own:
            write_atomically(copy, content)


def _merge_evaluations(bundle: OpenBundle, root: Root, run_id: str, done: Imported) -> None:
    """Add the scores of a Run in the bundle to those here, unless the Run is being evaluated."""
    there = list(evaluations_of(bundle.unpacked, run_id))
    if all(_joined(root, run_id, found) is None for found in there):
        return
    folder = evaluation_folder(root, run_id)
    make_folder(folder)
    try:
        with file_lock(folder / "lock", wait=False):
            for found in there:
                if (joined := _joined(root, run_id, found)) is not None:
                    keep_evaluation(root, run_id, joined)
                    done.evaluations += 1
    except Timeout:
        done.notes.append(f"run {run_id}: is being evaluated here; import again later to add its scores")


def _joined(root: Root, run_id: str, found: Evaluation) -> Evaluation | None:
    """Add the evaluation here to one with the same settings; None if `found` has no new score."""
    own = held_evaluation(root, run_id, found.name)
    if own is None:
        return found
    if set(found.scores) <= set(own.scores):
        return None
    notes = tuple(dict.fromkeys([*own.notes, *found.notes]))
    return own.model_copy(update={"scores": found.scores | own.scores, "notes": notes})
