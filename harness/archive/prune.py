"""Dropping the checkpoints that no Run or extension needs, and the copies of the code that no job runs from.

Needed of a Series are, for every unfinished Run that any study under ROOT lists, the newest good checkpoint at or below
its branch point and its newest decay checkpoint; and the newest trunk checkpoint, from which a longer Run continues.
Cancelled and failed Runs are unfinished, since `retry` takes them up. A checkpoint replaces an older one only after it
was verified as a resuming trainer verifies it; one that fails stays where it is, because a disk that hesitates once
must not cost a checkpoint. Final weights are results and stay. The trials of a study's tuning are pruned with it.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.common.disk import size_of
from harness.common.format import GIB
from harness.dispatch.ledger import open_ledger
from harness.record import checkpoints
from harness.record.checkpoints import TAG, Checkpoint
from harness.record.control import Control
from harness.record.jobs import JobState, SchedulerUnavailable
from harness.record.journal import Event, read_progress
from harness.record.registry import ResolvedStudy, resolve_registered, trials_name
from harness.record.root import Root, read_run
from harness.record.series import untrained
from harness.study.run import Run, branch_step
from ssmttm.errors import InputError

COPY = re.compile(r"\.?([0-9a-f]{12})(\.[0-9a-f]{8})?")
"""A copy, or the draft of one that a killed submission left."""
FRESH_SECONDS = 3600.0
"""Time a submission has between asking for a copy and being known to SLURM."""
ITEMS_A_LINE = 1000
"""Checkpoints named in one line of control.jsonl: longer lines are not read."""


@dataclass(frozen=True)
class Item:
    """One checkpoint, or what is left of one; or one copy of the code."""

    owner: str
    """Whose it is: "series ID", "run ID", or "code STATE"."""
    path: Path
    """Its folder, or the file that is left of it."""
    step: int | None
    """Of a checkpoint."""
    bytes: int
    why: str
    """Reason why it goes or stays."""

    def as_json(self, root: Root) -> dict[str, Any]:
        """A row of `ssmscale prune --json`, its path below ROOT."""
        return {
            "owner": self.owner,
            "path": str(self.path.relative_to(root.path)),
            "step": self.step,
            "gib": self.bytes / GIB,
            "why": self.why,
        }


@dataclass
class Pruned:
    """The outcome: what went (would go, in a dry run), what stays, and what was not looked at."""

    removed: list[Item] = field(default_factory=list)
    kept: list[Item] = field(default_factory=list)
    trials: list[str] = field(default_factory=list)
    """Series among those looked at that the study's tuning had trained."""
    busy: list[str] = field(default_factory=list)
    """Series in training: left alone."""
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes that went."""
        return sum(item.bytes for item in self.removed)


@dataclass(frozen=True)
class _Wanted:
    """The Runs of one Series, and whether some study wants its best checkpoint kept."""

    runs: dict[str, Run]
    keep_best: bool


def prune(resolved: ResolvedStudy, *, dry_run: bool = False) -> Pruned:
    """Drop what is not needed of every Series of a study and its trials, each under its lock.

    control.jsonl lists what went. With `dry_run` nothing is removed. Raises OSError where something cannot be removed,
    after listing what was.
    """
    root, done = resolved.root, Pruned()
    own = list(dict.fromkeys(point.run.series_id for point in resolved.points))
    wanted = _wanted_by_all(resolved, done.notes)
    searched = trials_name(resolved.study.name)
    trials = _submitted(root.control(searched), wanted)
    if resolved.study.resources.keep_best:
        wanted |= {series_id: replace(wanted[series_id], keep_best=True) for series_id in trials}
    try:
        for series_id in dict.fromkeys([*own, *trials]):
            if root.series(series_id).is_dir():
                _prune_series(root, series_id, wanted[series_id], done, dry_run=dry_run)
                done.trials += [series_id] if series_id in trials else []
        for name in (resolved.study.name, searched):
            _prune_copies(root.study(name), done, dry_run=dry_run)
    finally:
        if not dry_run:
            _write_down(resolved, done.removed)
    return done


def _submitted(control: Control, wanted: Mapping[str, _Wanted]) -> list[str]:
    """Series of which Runs were submitted, as a control.jsonl says."""
    events = (event for event in control.read() if event["event"] == "submitted")
    submitted = {run_id for event in events for run_id in event["runs"]}
    return [series_id for series_id, one in wanted.items() if submitted & one.runs.keys()]


def _write_down(resolved: ResolvedStudy, removed: Sequence[Item]) -> None:
    control = resolved.root.control(resolved.study.name)
    for first in range(0, len(removed), ITEMS_A_LINE):
        part = removed[first : first + ITEMS_A_LINE]
        items = [item.as_json(resolved.root) for item in part]
        control.append("pruned", bytes=sum(item.bytes for item in part), removed=items)


def _wanted_by_all(resolved: ResolvedStudy, notes: list[str]) -> dict[str, _Wanted]:
    """The Runs of every Series, whichever study under ROOT lists them and whether or not any can be read."""
    root = resolved.root
    studies = [resolved]
    for path in sorted((root.path / "studies").glob("*/study.json")):
        try:
            found = resolve_registered(root, path.parent.name)
        except InputError as error:
            notes.append(f"{error}; its runs that have begun count as wanted")
            continue
        if found is not None:
            studies.append(found)
    runs: dict[str, dict[str, Run]] = {}
    best: set[str] = set()
    for study in studies:
        for point in study.points:
            series_id = point.run.series_id
            runs.setdefault(series_id, {})[point.run.run_id] = point.run
            if study.study.resources.keep_best:
                best.add(series_id)
    for path in sorted((root.path / "runs").glob("*/run.json")):
        try:
            run = read_run(path.parent)
        except InputError as error:
            notes.append(f"{error}; what it needs is not known")
            continue
        runs.setdefault(run.series_id, {})[run.run_id] = run
    return {series_id: _Wanted(found, series_id in best) for series_id, found in runs.items()}


def _prune_series(root: Root, series_id: str, wanted: _Wanted, done: Pruned, *, dry_run: bool) -> None:
    with untrained(root.series(series_id)) as is_free:
        if not is_free:
            done.busy.append(series_id)
            return
        for items, needed in _sorted_out(root, series_id, wanted):
            for item in items:
                _prune(item, done, stays=item.path in needed, dry_run=dry_run)


def _prune_copies(study_dir: Path, done: Pruned, *, dry_run: bool) -> None:
    for path, stays, why in _judged_copies(study_dir):
        item = Item(f"code {path.name}", path, None, size_of(path), why)
        _prune(item, done, stays=stays, dry_run=dry_run)


def _prune(item: Item, done: Pruned, *, stays: bool, dry_run: bool) -> None:
    if not stays and not dry_run:
        _remove(item.path)
    (done.kept if stays else done.removed).append(item)


def _judged_copies(study_dir: Path) -> Iterator[tuple[Path, bool, str]]:
    """Every copy of a study's code, whether it stays, and why.

    Those stay that a job in SLURM runs from or soon will; where SLURM does not answer, all that jobs ever ran from.
    """
    folder = study_dir / "code"
    copies = sorted(path for path in folder.glob("*") if path.is_dir() and COPY.fullmatch(path.name))
    if not copies:
        return
    try:
        ledger, unknown = open_ledger(study_dir), None
    except SchedulerUnavailable as gone:
        ledger, unknown = None, f"whether a job needs it is not known: {gone}"
    needed = set()
    if ledger is not None:
        live = {JobState.QUEUED, JobState.RUNNING}
        needed = {
            array.copy_of_code
            for array, _, view in ledger.elements()
            if view is not None and view.state in live
        } | {
            array.copy_of_code
            for array in ledger.arrays.values()
            if (array.job_id is None and not array.is_void) or array.name in ledger.elsewhere
        }
    for path in copies:
        if time.time() - path.stat().st_mtime < FRESH_SECONDS:
            yield (path, True, "asked for within the last hour")
        elif path.name.startswith("."):
            yield (path, False, "never completed")
        elif unknown is not None:
            yield (path, True, unknown)
        elif path.name in needed:
            yield (path, True, "a job in SLURM runs from it")
        else:
            yield (path, False, "no job runs from it any more")


def _sorted_out(root: Root, series_id: str, wanted: _Wanted) -> Iterator[tuple[list[Item], Set[Path]]]:
    """For the trunk's folder and for each Run's: everything in it, and the paths among it that stay."""
    unfinished = {run_id for run_id in wanted.runs if read_progress(root.run(run_id)).state != Event.FINISHED}
    needs = {
        branch_step(run.schedule, run.iterations): f"run {run_id} leaves the trunk at or after it"
        for run_id, run in sorted(wanted.runs.items())
        if run_id in unfinished
    }
    trunk = _Folder(f"series {series_id}", root.series(series_id) / "checkpoints")
    trunk.want(None, "the newest of the trunk: a longer run continues from it")
    for branch, why in needs.items():
        trunk.want(branch, why)
    if wanted.keep_best:
        trunk.want_best()
    yield trunk.items("an older branch point or periodic checkpoint"), trunk.needed.keys()
    for run_id in sorted(wanted.runs):
        own = _Folder(f"run {run_id}", root.run(run_id) / "checkpoints")
        if run_id in unfinished:
            own.want(None, "its decay goes on from it")
            if wanted.keep_best:
                own.want_best()
        over = "its run goes on from a newer one" if run_id in unfinished else "its run has finished"
        yield own.items(over), own.needed.keys()


class _Folder:
    """One folder of checkpoints, and what of it is needed."""

    def __init__(self, owner: str, folder: Path) -> None:
        self.owner, self.folder = owner, folder
        self.marked, problems = checkpoints.survey(folder)
        self._undecided = {problem.tag: problem.text for problem in problems if problem.tag is not None}
        """Tags that may be whole all the same, and why that is not known."""
        self.needed: dict[Path, str] = {}
        """Paths that stay, and why."""
        self._problems: dict[str, str | None] = {}

    def want(self, highest: int | None, why: str) -> None:
        """Keep the newest good checkpoint at or below step `highest`; None is the newest of all."""
        for found in reversed(self.marked):
            if highest is not None and found.marker.step > highest:
                continue
            if (problem := self._problem_with(found)) is None:
                self.needed.setdefault(self.folder / found.tag, why)
                return
            self.needed[self.folder / found.tag] = f"cannot be verified, so it replaces none: {problem}"

    def want_best(self) -> None:
        """Keep the good checkpoint with the lowest held-out loss, where any was evaluated."""
        for found in checkpoints.best_first(self.marked):
            if self._problem_with(found) is None:
                self.needed.setdefault(self.folder / found.tag, "the best held-out loss (keep_best)")
                return

    def items(self, otherwise: str) -> list[Item]:
        """Everything here that is a checkpoint or was to become one; `otherwise` is why a whole one goes."""
        whole = {found.tag for found in self.marked}
        found = []
        for path in sorted(_pieces(self.folder)):
            tag = path.name.removeprefix(".").split(".")[0]
            matched = TAG.fullmatch(tag)
            if path.is_dir() and path.name not in whole and path.name in self._undecided:
                self.needed[path] = f"cannot be judged, so it stays: {self._undecided[path.name]}"
            if path in self.needed:
                why = self.needed[path]
            elif path.name in whole:
                why = otherwise
            elif (self.folder / f"{tag}.damaged").exists():
                why = "found damaged when it was to be resumed from"
            elif (self.folder / f"{tag}.complete").exists():
                why = "its files are not those its marker lists"
            else:
                why = "never completed"
            found.append(Item(self.owner, path, int(matched[1]) if matched else 0, size_of(path), why))
        return found

    def _problem_with(self, found: Checkpoint) -> str | None:
        if found.tag not in self._problems:
            self._problems[found.tag] = checkpoints.problem_with(found)
        return self._problems[found.tag]


def _pieces(folder: Path) -> Iterator[Path]:
    """Folders of checkpoints, markers without one, and drafts a killed process left; never anything else."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and TAG.fullmatch(path.name):
            yield path
        elif path.suffix in {".complete", ".damaged"} and TAG.fullmatch(path.stem):
            if not path.with_suffix("").is_dir():
                yield path
        elif path.name == ".model.safetensors.draft" or (
            path.name.startswith(".step-") and TAG.fullmatch(path.name[1:].split(".")[0])
        ):
            yield path


def _remove(path: Path) -> None:
    """Markers first, so that a checkpoint is never half there; raises OSError where the rest cannot go."""
    if path.is_dir():
        for ending in (".complete", ".damaged"):
            path.with_suffix(ending).unlink(missing_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:  # of a link the link alone: what it leads to is somebody's own
        path.unlink()
