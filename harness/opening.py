"""From what a user calls a study or a run to the study and the run: what most verbs of the command begin with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness import submission
from harness.control import Control
from harness.dispatch.slurm_book import Book, jobs_of_runs, open_book
from harness.dispatch.slurm_queue import JobView, SchedulerGone
from harness.remaining import unfinished
from harness.rundir import Root
from harness.status import RunState, RunStatus, StatusReader
from harness.study import Study, load_study
from harness.submission import ResolvedStudy
from harness.terminal import counted, warn
from ssmttm.errors import InputError


def open_study(
    study: str, root: Path | None, changes: Sequence[str] | None, *, fetch: bool = True
) -> ResolvedStudy:
    """A study from its YAML, or by the name it was submitted under; `fetch` as for `resolve`."""
    path = Path(study)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        loaded = load_study(path, changes or ())
        return submission.resolve(loaded, Root(root or loaded.root or Path("runs")), study, fetch=fetch)
    found = submission.resolve_registered(Root(root or Path("runs")), study) if _is_name(study) else None
    if found is None:
        raise InputError(
            f"{study}: neither a file nor the name of a study under {(root or Path('runs')) / 'studies'}"
        )
    if changes:
        raise InputError(f"{study}: --set changes a YAML file; this is a study as it was submitted")
    return found


def place_of(study: str, root: Path | None, changes: Sequence[str] | None = None) -> tuple[Study, Root]:
    """A study and where its runs are kept; neither its corpus nor a submission is needed."""
    path = Path(study)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        loaded = load_study(path, changes or ())
        return loaded, Root(root or loaded.root or Path("runs"))
    resolved = open_study(study, root, changes)
    return resolved.study, resolved.root


def registered(study: str, root: Path | None, *, fetch: bool = False) -> ResolvedStudy:
    """A study as it was submitted; the YAML itself where it was not, `fetch` as for `resolve`."""
    path = Path(study)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        loaded = load_study(path)
        place = Root(root or loaded.root or Path("runs"))
        return submission.resolve_registered(place, loaded.name) or submission.resolve(
            loaded, place, study, fetch=fetch
        )
    return open_study(study, root, None)


def _is_name(study: str) -> bool:
    return "/" not in study and not study.startswith(".")


def rows_of(resolved: ResolvedStudy) -> list[RunStatus]:
    """Where every Run of a study stands now."""
    return StatusReader(resolved.root, resolved.study.name).read(resolved.points, jobs=jobs_of(resolved))


def jobs_of(resolved: ResolvedStudy) -> dict[str, JobView]:
    """What SLURM and Ray say of the study's jobs, by run id; nothing, and a warning, where they do not answer."""
    folder = resolved.root.study(resolved.study.name)
    if not (folder / "arrays").is_dir():
        return {}
    try:
        book = open_book(folder)
    except SchedulerGone as gone:
        warn(f"{gone}; the journals tell what is known")
        return {}
    if book.problem:
        warn(f"{book.problem}; the journals tell what is known")
    _warn_of_elsewhere(book, folder)
    return jobs_of_runs(book)


def _warn_of_elsewhere(book: Book, folder: Path) -> None:
    """Name the arrays of other clusters that have something left to train: nothing is known of them here."""
    for name, cluster in book.elsewhere.items():
        array = book.arrays[name]
        left = unfinished(
            [run for task in array.tasks for run in task.run_dirs], Control(folder / "control.jsonl")
        )
        if left:
            what = f"job {array.job_id}" if array.job_id else f"a submission of {name}"
            warn(
                f"{counted(len(left), 'run')} left to {what} of SLURM cluster {cluster}, which is not asked "
                f"from here: see to it there; if there is no such cluster any more, remove {folder}/arrays/{name}.json"
            )


def begun(resolved: ResolvedStudy) -> list[RunStatus]:
    """The study's rows; raises InputError where nothing of it was ever trained here."""
    rows = rows_of(resolved)
    if all(row.state in {RunState.NEW, RunState.CANCELLED} for row in rows):
        name = resolved.study.name
        raise InputError(
            f"study {name}: nothing of it has been trained under {resolved.root.path}; submit it first"
        )
    return rows


def choose(rows: list[RunStatus], wanted: Sequence[str] | None) -> list[RunStatus]:
    """The rows whose ids begin with what is wanted, all where nothing is; raises InputError unless each means one."""
    if not wanted:
        return rows
    chosen = []
    for name in wanted:
        found = [row for row in rows if row.run_id.startswith(name)]
        if len(found) != 1:
            raise InputError(
                f"{name}: begins the id of {len(found)} runs of this study; see `ssmscale status`"
            )
        chosen += found
    return chosen
