"""What every job executes, whoever started it: train the Runs of the directories it is given.

    python -m harness.worker RUN_DIR...         one process, or as many ranks as torchrun or a scheduler starts
    python -m harness.worker --feed             one JSON list of run directories a line on standard input

Runs of one Series are trained together along their trunk. A fed worker answers each line with one JSON line on
standard output and stays, imports done and process group kept, until its input ends: starting a process costs more
than training a small model. Everything else it has to say goes to standard error and to the series' log.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness.control import Control
from harness.journal import Event, Fenced, Journal, read_progress
from harness.process import identify_process
from harness.provenance import commit, installed_version
from harness.run import Run
from harness.rundir import Launch, Root, read_launch, read_run
from harness.training.engine import Ranks, initialise_ranks
from harness.training.loop import Diverged, Outcome, SeriesTrainer, series_layout
from harness.training.preemption import StopFlag, stop_when_parent_ends
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.worker")

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: stopped at a step boundary with everything saved, or busy elsewhere: to be started again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker; returns its exit status: 0 done, 1 some Run failed, 2 bad input, 75 preempted."""
    parser = argparse.ArgumentParser(prog="python -m harness.worker", description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR")
    parser.add_argument("--feed", action="store_true", help="read run directories from standard input")
    options = parser.parse_args(arguments)
    if not options.feed and not options.run_dirs:
        parser.error("give RUN_DIRs, or --feed")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    stop = StopFlag()
    try:
        if options.feed:
            stop_when_parent_ends()
            return _serve(stop)
        stop.install()
        return _run_all(options.run_dirs, stop)
    except InputError as error:
        log.error("%s", error)
        return 2


def _run_all(run_dirs: Sequence[Path], stop: StopFlag) -> int:
    outcomes = []
    for root, runs in group_by_series(run_dirs):
        outcomes.append(train_series(runs, root, stop))
        log.info("series %s: %s", runs[0].series_id, outcomes[-1])
    if {"preempted", "busy"} & set(outcomes):
        return EXIT_PREEMPTED
    return 1 if "failed" in outcomes else 0


def _serve(stop: StopFlag) -> int:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing but replies may reach standard output
    initialise_ranks(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stop.install()  # not before: there was nothing to save, and waiting for other ranks heeds no flag
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in _lines(sys.stdin.fileno(), stop):
        outcome = "failed"
        try:
            for root, runs in group_by_series([Path(name) for name in json.loads(line)]):
                outcome = train_series(runs, root, stop)
        except InputError as error:
            log.error("%s", error)
        replies.write(json.dumps({"outcome": outcome}) + "\n")
    return 0


def _lines(descriptor: int, stop: StopFlag) -> Iterator[str]:
    """Lines of a descriptor until it ends or this process is asked to stop."""
    import select

    held = b""
    while not stop.reason:
        if not select.select([descriptor], [], [], 0.2)[0]:
            continue
        part = os.read(descriptor, 65536)
        if not part:
            return
        held += part
        while b"\n" in held:
            line, held = held.split(b"\n", 1)
            yield line.decode()


def group_by_series(run_dirs: Iterable[Path]) -> list[tuple[Root, list[Run]]]:
    """The Runs of the directories, those of one Series together, in the order given."""
    groups: dict[tuple[Path, str], list[Run]] = {}
    for folder in run_dirs:
        run = read_run(folder.absolute())
        groups.setdefault((folder.absolute().parent.parent, run.series_id), []).append(run)
    return [(Root(path), runs) for (path, _), runs in groups.items()]


def train_series(runs: Sequence[Run], root: Root, stop: StopFlag) -> str:
    """Train what is missing of one Series: finished, failed, preempted, or busy where another process has it."""
    series_id = runs[0].series_id
    folder = root.series(series_id)
    launch = read_launch(root, series_id)
    ranks = initialise_ranks(launch.threads)
    lock = FileLock(folder / "lock")
    with _logging_to(folder / "logs", ranks):
        if not ranks.tell(not ranks.is_first or _acquire(lock)):
            return "busy"
        try:
            states = ranks.tell([read_progress(root.run(run.run_id)).state for run in runs])
            missing = [run for run, state in zip(runs, states, strict=True) if state != Event.FINISHED]
            return _train_locked(missing, root, launch, ranks, stop) if missing else "finished"
        finally:
            gc.collect()  # an engine refers to itself: its memory is wanted by the next Series
            lock.release()


def _acquire(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _train_locked(runs: Sequence[Run], root: Root, launch: Launch, ranks: Ranks, stop: StopFlag) -> str:
    folder = root.series(runs[0].series_id)
    before = {run.run_id: read_progress(root.run(run.run_id)).attempt for run in runs}
    process = describe_process(launch)
    start = Event.RESUMED if read_progress(folder).attempt else Event.STARTED
    journal = Journal.open(folder) if ranks.is_first else None
    try:
        layout = series_layout(root, runs, launch, ranks)
        if journal is not None:
            journal.append(start, **process, layout=layout.model_dump(), device=ranks.device)
        trainer = SeriesTrainer(root, runs, launch, ranks, layout, stop, process)
        outcome = trainer.train(journal)
    except Diverged as error:  # every rank saw the same loss
        _fail(runs, root, launch, journal, str(error), "diverged", before)
        return "failed"
    except Exception as error:
        if not isinstance(error, InputError | Fenced):
            traceback.print_exc()
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        log.error("series %s: %s", folder.name, reason)
        if ranks.world > 1:
            # The others are somewhere else now, and what the first rank sees may be their end and not the cause:
            # whoever started the ranks ends them all and tries again.
            raise SystemExit(1) from error
        if isinstance(error, Fenced):
            return "busy"
        _fail(runs, root, launch, journal, reason, "error", before)
        return "failed"
    if outcome in {Outcome.PREEMPTED, Outcome.FENCED}:
        return "preempted" if outcome is Outcome.PREEMPTED else "busy"
    if journal is not None:
        journal.append(Event.FINISHED)
        journal.close()
    states = [read_progress(root.run(run.run_id)).state for run in runs]
    return "failed" if Event.FAILED in states else "finished"


def _fail(
    runs: Sequence[Run],
    root: Root,
    launch: Launch,
    journal: Journal | None,
    reason: str,
    kind: str,
    before: Mapping[str, int],
) -> None:
    """Write the reason into the trunk's journal and into that of every Run it takes with it.

    `before` holds each Run's attempts when this training began: those that ended since have their own word, and
    cancelled ones stay cancelled.
    """
    if journal is None:
        return
    journal.append(Event.FAILED, reason=reason, kind=kind)
    journal.close()
    cancelled = Control(launch.control).cancelled()
    for run in runs:
        own = read_progress(root.run(run.run_id))
        failed = own.state == Event.FAILED and own.attempt > before[run.run_id]
        if own.state != Event.FINISHED and not failed and run.run_id not in cancelled:
            with Journal.open(root.run(run.run_id)) as latest:
                latest.append(Event.FAILED, reason=reason, kind=kind)


def describe_process(launch: Launch) -> dict[str, Any]:
    """Who trains: process, versions, code and dispatcher, for a journal's first line."""
    return {
        **identify_process(),
        "dispatcher": launch.dispatcher,
        "job_id": os.environ.get("SLURM_JOB_ID", str(os.getpid())),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in ("ssmscale", "torch", "deepspeed")},
        "commit": commit(),
    }


@contextmanager
def _logging_to(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Send standard output and error to the series' log while it is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with (folder / f"rank-{ranks.rank}.log").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


if __name__ == "__main__":
    sys.exit(main())
