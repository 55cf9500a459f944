"""Removing the checkpoints that no Run or extension needs, and the copies of the code that no job runs from.

A Series needs, for every unfinished Run that any study under ROOT lists, the newest good checkpoint at or below its
branch point and its newest decay checkpoint; and the newest trunk checkpoint, which a longer Run continues. Cancelled
and failed Runs are unfinished, since `retry` continues them. A checkpoint replaces an older one only if it passes the
checks of a resuming trainer; one that fails stays, because one failure of a disk must not cost a checkpoint. Final
weights are results and stay. The trials of a study's tuning are pruned with it.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from harness.common.disk import check_inside, size_of
from harness.common.format import GIB
from harness.dispatch.ledger import open_ledger
from harness.record import checkpoints
from harness.record.checkpoints import TAG, Checkpoint
from harness.record.jobs import LIVE, SchedulerUnavailable
from harness.record.journal import Event, read_progress
from harness.record.registry import Registration, ResolvedStudy, trials_name
from harness.record.root import Root, read_model, read_run
from harness.record.series import untrained
from harness.study.grid import GridPoint
from harness.study.run import Run, branch_step
from harness.study.schema import Study
from ssmttm.errors import InputError


@dataclass(frozen=True)
class Item:
    """A checkpoint, a remaining file of one, or a copy of the code."""

    owner: str
    """Owner: "series ID", "run ID", or "code STATE"."""
    path: Path
    step: int | None
    """Step of a checkpoint; None for a copy of the code."""
    bytes: int
    why: str
    """Reason why it goes or stays."""

    def as_json(self, root: Root) -> dict[str, Any]:
        """Return a row of `ssmscale prune --json`, its path relative to ROOT."""
        path = str(self.path.relative_to(root.path))
        size = {"gib": self.bytes / GIB, "why": self.why}
        return {"owner": self.owner, "path": path, "step": self.step, **size}


@dataclass
class Pruned:
    """The outcome: items removed (in a dry run, to be removed), items kept, and Series left out."""

    removed: list[Item] = field(default_factory=list)
    kept: list[Item] = field(default_factory=list)
    trials: list[str] = field(default_factory=list)
    """Pruned Series that the study's tuning had trained."""
    busy: list[str] = field(default_factory=list)
    """Series in training, which were left out."""
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of the removed items."""
        return sum(item.bytes for item in self.removed)


COPY = re.compile(r"\.?([0-9a-f]{12})(\.[0-9a-f]{8})?")
"""A copy, or the unfinished copy of a killed submission."""
FRESH_SECONDS = 3600.0
"""Longest time from a submission's use of a copy to SLURM's answer."""
ITEMS_A_LINE = 1000
"""Checkpoints in one line of control.jsonl: readers reject longer lines."""


def prune(
    resolved: ResolvedStudy,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Pruned:
    """Remove what no Run needs of every Series of a study and its trials, each under its lock.

    control.jsonl lists the removed items. With `dry_run` nothing is removed. `progress` is called with the numbers of
    files of studies and runs read and to read. Raises OSError where an item cannot be removed, after listing the
    others.
    """
    root, done = resolved.root, Pruned()
    searched = trials_name(resolved.study.name)
    events = (event for event in root.control(searched).read() if event["event"] == "submitted")
    submitted = {run_id for event in events for run_id in event["runs"]}
    runs, best = _runs_of(resolved, submitted, done.notes, progress)
    trials = [series_id for series_id, members in runs.items() if submitted & members.keys()]
    if resolved.study.resources.keep_best:
        best.update(trials)
    try:
        for series_id in dict.fromkeys([*(point.series_id for point in resolved.points), *trials]):
            if root.series(series_id).is_dir():
                with untrained(root.series(series_id)) as is_free:
                    if not is_free:
                        done.busy.append(series_id)
                    else:
                        for items, needed in _sorted_out(root, series_id, runs[series_id], series_id in best):
                            _prune(items, needed, done, dry_run=dry_run)
                done.trials += [series_id] if series_id in trials else []
        for name in (resolved.study.name, searched):
            for item, stays in _judged_copies(root.study(name)):
                _prune([item], {item.path} if stays else set(), done, dry_run=dry_run)
    finally:
        if not dry_run:
            control = root.control(resolved.study.name)
            for first in range(0, len(done.removed), ITEMS_A_LINE):
                part = done.removed[first : first + ITEMS_A_LINE]
                rows = [item.as_json(root) for item in part]
                control.append("pruned", bytes=sum(item.bytes for item in part), removed=rows)
    return done


def _runs_of(
    resolved: ResolvedStudy, trials: Set[str], notes: list[str], progress: Callable[[int, int], None]
) -> tuple[dict[str, dict[str, Run]], set[str]]:
    """Return the Runs under ROOT, listed or begun, of each Series of a study and its trials.

    Also return the Series whose best checkpoint stays. The files of a ROOT are read one by one, since it may hold tens
    of thousands of studies and runs; only what belongs to those Series is kept.
    """
    root = resolved.root
    run_files = sorted((root.path / "runs").glob("*/run.json"))
    study_files = sorted((root.path / "studies").glob("*/study.json"))
    total = 2 * len(run_files) + len(study_files)
    done = count()

    def begun() -> Iterator[Run]:
        for path in run_files:
            progress(next(done), total)
            with suppress(InputError):
                yield read_run(path.parent)

    searched = [run for run in begun() if run.run_id in trials]
    wanted = {point.series_id for point in resolved.points} | {run.series_id for run in searched}
    data = {
        (run.corpus, run.text_encoder) for run in (*(point.run for point in resolved.points[:1]), *searched)
    }
    runs: dict[str, dict[str, Run]] = {}
    best: set[str] = set()

    def add(points: Sequence[GridPoint], study: Study) -> None:
        for point in points:
            if point.series_id in wanted:
                runs.setdefault(point.series_id, {})[point.run_id] = point.run
                if study.resources.keep_best:
                    best.add(point.series_id)

    add(resolved.points, resolved.study)
    for path in study_files:
        progress(next(done), total)
        try:
            held = read_model(path, Registration)
            # A Series has one corpus and one encoder.
            if (held.corpus.fingerprint, held.text_encoder) in data:
                add(held.expand(str(path)), held.study)
        except InputError as error:
            notes.append(f"{error}; those of its runs that have begun keep their checkpoints")
    for path in run_files:
        progress(next(done), total)
        try:
            run = read_run(path.parent)
        except InputError as error:
            notes.append(f"{error}; the checkpoints it needs stay only if a study lists it")
        else:
            if run.series_id in wanted:
                runs.setdefault(run.series_id, {})[run.run_id] = run
    return runs, best


def _prune(items: Iterable[Item], needed: Set[Path], done: Pruned, *, dry_run: bool) -> None:
    for item in items:
        try:
            check_inside(item.path.parents[2], item.path)
        except InputError as error:
            done.notes.append(str(error))
            done.kept.append(replace(item, why="a link leads to it"))
            continue
        if item.path in needed:
            done.kept.append(item)
        else:
            if not dry_run:
                _remove(item.path)
            done.removed.append(item)


def _judged_copies(study_dir: Path) -> Iterator[tuple[Item, bool]]:
    """Yield every copy of a study's code, with True if it stays.

    A copy stays if a job in SLURM runs from it or soon will; if SLURM does not answer, every complete copy stays.
    """
    folder = study_dir / "code"
    copies = sorted(path for path in folder.glob("*") if path.is_dir() and COPY.fullmatch(path.name))
    if not copies:
        return
    needed, unknown = set(), None
    try:
        ledger = open_ledger(study_dir)
    except SchedulerUnavailable as gone:
        unknown = f"a job may need it: {gone}"
    else:
        needed = {
            array.copy_of_code
            for array, _, view in ledger.elements()
            if view is not None and view.state in LIVE
        } | {
            array.copy_of_code
            for array in ledger.arrays.values()
            if (array.job_id is None and not array.is_void) or array.name in ledger.elsewhere
        }
    for path in copies:
        stays, why = False, "no job runs from it any more"
        if time.time() - path.stat().st_mtime < FRESH_SECONDS:
            stays, why = True, "a submission used it within the last hour"
        elif path.name.startswith("."):
            why = "never completed"
        elif unknown is not None:
            stays, why = True, unknown
        elif path.name in needed:
            stays, why = True, "a job in SLURM runs from it"
        yield Item(f"code {path.name}", path, None, size_of(path), why), stays


def _sorted_out(
    root: Root, series_id: str, runs: Mapping[str, Run], keep_best: bool
) -> Iterator[tuple[list[Item], Set[Path]]]:
    """Yield for the trunk's folder and for each Run's all its items, and the paths that stay."""
    unfinished = {run_id for run_id in runs if read_progress(root.run(run_id)).state != Event.FINISHED}
    needs = {
        branch_step(run.schedule, run.iterations): f"run {run_id} leaves the trunk at or after it"
        for run_id, run in sorted(runs.items())
        if run_id in unfinished
    }
    trunk = _Folder(f"series {series_id}", root.series(series_id) / "checkpoints")
    trunk.want(None, "the newest of the trunk: a longer run continues from it")
    for branch, why in needs.items():
        trunk.want(branch, why)
    if keep_best:
        trunk.want_best()
    yield trunk.items("an older branch point or periodic checkpoint"), trunk.needed.keys()
    for run_id in sorted(runs):
        own = _Folder(f"run {run_id}", root.run(run_id) / "checkpoints")
        if run_id in unfinished:
            own.want(None, "its decay goes on from it")
            if keep_best:
                own.want_best()
        over = "its run goes on from a newer one" if run_id in unfinished else "its run has finished"
        yield own.items(over), own.needed.keys()


class _Folder:
    """One folder of checkpoints, and those of them that a Run needs."""

    def __init__(self, owner: str, folder: Path) -> None:
        self.owner, self.folder = owner, folder
        self.marked, problems = checkpoints.survey(folder)
        self._undecided = {problem.tag: problem.text for problem in problems if problem.tag is not None}
        """Reasons why a tag could not be checked, so that it may be whole."""
        self.needed: dict[Path, str] = {}
        """Paths that stay, with reasons."""
        self._problems: dict[str, str | None] = {}

    def want(self, highest: int | None, why: str) -> None:
        """Keep the newest good checkpoint up to step `highest`, the newest of all if that is None."""
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
        """Return all checkpoints here, whole or not; `otherwise` is the reason why a whole one goes."""
        whole = {found.tag for found in self.marked}
        found = []
        for path in sorted(_pieces(self.folder)):
            tag = path.name.removeprefix(".").split(".")[0]
            matched = TAG.fullmatch(tag)
            if path.is_dir() and path.name not in whole and path.name in self._undecided:
                self.needed[path] = f"cannot be checked, so it stays: {self._undecided[path.name]}"
            if path in self.needed:
                why = self.needed[path]
            elif path.name in whole:
                why = otherwise
            elif (self.folder / f"{tag}.damaged").exists():
                why = "found damaged when a trainer resumed"
            elif (self.folder / f"{tag}.complete").exists():
                why = "its files are not those in its marker"
            else:
                why = "never completed"
            found.append(Item(self.owner, path, int(matched[1]) if matched else 0, size_of(path), why))
        return found

    def _problem_with(self, found: Checkpoint) -> str | None:
        if found.tag not in self._problems:
            problem = checkpoints.inspect(found)
            self._problems[found.tag] = problem.text if problem else None
        return self._problems[found.tag]


def _pieces(folder: Path) -> Iterator[Path]:
    """Yield folders of checkpoints, markers without one, and drafts of killed processes, but no other file."""
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
    """Remove markers first, so that a marked checkpoint is always whole; raises OSError where the rest fails."""
    if path.is_dir():
        for ending in (".complete", ".damaged"):
            path.with_suffix(ending).unlink(missing_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:  # a link goes, but not its target, which may belong to another user
        path.unlink()
