"""Bringing a bundle's Runs into a ROOT: what is finished here stays as it is, what is new comes after what is here.

An attempt is known by its first line, which names its process and the time. A copy that is here already is not brought
again, and of two copies of which one goes on where the other ends the longer stays. Everything else is added as newer
attempts, under the lock a trainer of the Series would hold: a newer attempt fences an older one, and an import must
fence no trainer. A Series in training is left alone as a whole.

Scores of evaluations join those that are here, metric by metric; where both have one, the one here stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from harness.archive.check import OpenBundle
from harness.archive.export import whole_lines, without_tracker
from harness.common.disk import write_atomically
from harness.record.journal import Event, attempt_file, attempts, read_progress
from harness.record.registry import ResolvedStudy, resolve_registered
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


@dataclass
class Imported:
    """The outcome of an import."""

    added: list[str] = field(default_factory=list)
    """Runs that are finished here now and were not before."""
    present: list[str] = field(default_factory=list)
    """Runs that were finished here already."""
    busy: list[str] = field(default_factory=list)
    """Series in training here: nothing of them was brought."""
    evaluations: int = 0
    """Files of scores that are new here, or hold more than before."""
    notes: list[str] = field(default_factory=list)


def merge(bundle: OpenBundle, root: Root) -> Imported:
    """Add a checked bundle to `root`; doing so again changes nothing.

    Raises InputError, before anything is written, where a study of that name, a run.json or an evaluation here cannot
    be read.
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
    if registered is not None:
        _note_unlisted(registered, done)
    elif done.added or done.present:
        _register(bundle, root)
    if done.added:
        root.control(bundle.contents.study).append("imported", runs=done.added)
    return done


def _is_finished(root: Root, run: Run) -> bool:
    return read_progress(root.run(run.run_id)).state == Event.FINISHED


def _merge_series(
    bundle: OpenBundle, root: Root, series_id: str, runs: Sequence[Run], done: Imported
) -> None:
    root.series(series_id).mkdir(parents=True, exist_ok=True)
    with untrained(root.series(series_id)) as is_free:
        if not is_free:
            done.busy.append(series_id)
            return
        write_series(root, runs[0])
        _merge_journal(root.series(series_id), bundle.unpacked.series(series_id))
        for run in runs:  # after the trunk's: a Run that is finished here is not looked at again
            if _is_finished(root, run):
                done.present.append(run.run_id)
                continue
            write_run(root, run)
            _merge_journal(root.run(run.run_id), bundle.unpacked.run(run.run_id))
            if _is_finished(root, run):
                done.added.append(run.run_id)
            else:
                done.notes.append(
                    f"{root.run(run.run_id)}: its own journal goes on after the attempt that finished"
                )


def _merge_journal(here: Path, there: Path) -> None:
    """Add the attempts of `there` that are not `here`, as newer ones; the caller holds the Series' lock."""
    known: dict[bytes, Path] = {}
    for attempt in attempts(here):
        path = attempt_file(here, attempt)
        known.setdefault(_first_line(whole_lines(path)), path)
    for attempt in attempts(there):
        content = whole_lines(attempt_file(there, attempt))
        copy = known.get(_first_line(content))
        if copy is None:
            number = max(attempts(here), default=0) + 1
            write_atomically(attempt_file(here, number), content)
            continue
        own = whole_lines(copy)
        if len(content) > len(own) and content.startswith(own):
            write_atomically(copy, content)


def _merge_evaluations(bundle: OpenBundle, root: Root, run_id: str, done: Imported) -> None:
    """Add to what was found of a Run here what was found of it there, unless it is being evaluated."""
    there = list(evaluations_of(bundle.unpacked, run_id))
    if all(_joined(root, run_id, found) is None for found in there):
        return
    folder = evaluation_folder(root, run_id)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", blocking=False):
            for found in there:
                if (joined := _joined(root, run_id, found)) is not None:
                    keep_evaluation(root, run_id, joined)
                    done.evaluations += 1
    except Timeout:
        done.notes.append(
            f"run {run_id}: is being evaluated here; import again for what the bundle found of it"
        )


def _joined(root: Root, run_id: str, found: Evaluation) -> Evaluation | None:
    """Join two evaluations under the same settings; None where nothing would be new."""
    own = held_evaluation(root, run_id, found.name)
    if own is None:
        return found
    if set(found.scores) <= set(own.scores):
        return None
    notes = tuple(dict.fromkeys([*own.notes, *found.notes]))
    return own.model_copy(update={"scores": found.scores | own.scores, "notes": notes})


def _first_line(content: bytes) -> bytes:
    return content.partition(b"\n")[0]


def _register(bundle: OpenBundle, root: Root) -> None:
    """Register the bundle's study, of whose name there is none here yet."""
    here, there = root.study(bundle.contents.study), bundle.unpacked.path
    if (there / "calibration.json").exists():
        write_atomically(here / "calibration.json", (there / "calibration.json").read_bytes())
    write_atomically(here / "study.json", without_tracker((there / "study.json").read_bytes()))


def _note_unlisted(registered: ResolvedStudy, done: Imported) -> None:
    listed = {point.run.run_id for point in registered.points}
    others = sum(run_id not in listed for run_id in (*done.added, *done.present))
    if others:
        done.notes.append(
            f"the study {registered.study.name} registered here stays as it is and does not list {others} of these "
            f"runs; submit one that does, and it finds them finished"
        )
