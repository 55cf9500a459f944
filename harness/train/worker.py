"""Train the Runs of some directories: the program that every backend starts.

    python -m harness.train.worker RUN_DIR...         one process, or the ranks that a scheduler starts
    python -m harness.train.worker --feed             one order a line on standard input: a JSON list of RUN_DIRs
    python -m harness.train.worker --supervised RUN_DIR...   under a supervisor that reads the journals (slurm.job)

Runs of one Series train together along their trunk. When the Runs it was given are over, a worker trains those that
other studies have added to the work list of the Series. A worker with --feed answers each line with one JSON line on
standard output: the outcome, and if the process is spent, since it still holds an engine. It keeps its imports and its
process group until its input ends, since starting a process costs more than training a small model. Its log goes to
standard error and to the series' log file.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from harness.common.disk import DiskFull, disk_full, is_full, make_folder, naming_a_full_disk
from harness.common.process import (
    PipeReader,
    end_at_once,
    identify_process,
    log_to_stderr,
    print_traceback,
    sent_to,
    stop_when_parent_ends,
)
from harness.common.streams import flush_or_drop
from harness.record.control import Control
from harness.record.heartbeat import Heartbeat, written_bytes
from harness.record.journal import Event, Fenced, Journal, Progress, read_progress
from harness.record.kinds import Kind
from harness.record.nodes import NodeFailure, need_on_node, node_failure_in
from harness.record.provenance import commit, installed_version, running_code
from harness.record.root import Launch, Layout, Root, read_launch, read_run
from harness.record.series import SeriesLock, WorkList, scheduler_job, study_of
from harness.study.run import Run
from harness.tracking.live import mirrored_beside
from harness.train.engine import engines_held, free_memory
from harness.train.layout import series_layout
from harness.train.loop import Diverged, Outcome, SeriesTrainer
from harness.train.part import work_on
from harness.train.ranks import Ranks, device_name, initialise_ranks
from harness.train.shortage import note_shortage
from harness.train.stopping import (
    EXIT_NO_SPACE,
    EXIT_PREEMPTED,
    GPU_SHARE,
    STACK_SIGNAL,
    StopFlag,
    exit_status,
    is_out_of_memory,
)
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.worker")

LISTEN_SECONDS = 0.2
"""Longest time in which an idle worker notices a signal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker; return its exit status.

    It is 0 when done, 1 if some Run failed, 2 for bad input, 72 on a bad node, 74 if the disk is full, 75 if preempted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m harness.train.worker", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR")
    parser.add_argument("--feed", action="store_true", help="read run directories from standard input")
    parser.add_argument(
        "--supervised", action="store_true", help="exit with 0 if the journals hold the outcome"
    )
    parser.add_argument("--ranks", type=int, help="number of ranks that were started for these Runs")
    options = parser.parse_args(arguments)
    if not options.feed and not options.run_dirs:
        parser.error("give RUN_DIRs, or --feed")
    log_to_stderr()
    faulthandler.register(STACK_SIGNAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    running_code()  # cached now: the files may be edited while this process waits for its next Series
    stop = StopFlag()

    def run() -> int:
        if options.feed:
            stop_when_parent_ends()
            return _serve(stop)
        stop.install()
        status = _run_all(options.run_dirs, stop, options.ranks)
        # A rank that ends with another status has the rest killed, before they have closed what they hold.
        return 0 if options.supervised and status in {1, EXIT_PREEMPTED} else status

    try:
        return exit_status(run, log)
    finally:
        flush_or_drop()


def _run_all(run_dirs: Sequence[Path], stop: StopFlag, ranks: int | None) -> int:
    outcomes = []
    for root, runs in group_by_series(run_dirs):
        outcomes.append(train_series(runs, root, stop, ranks))
        log.info("series %s: %s", runs[0].series_id, outcomes[-1])
    if {"preempted", "busy"} & set(outcomes):
        return EXIT_PREEMPTED
    return 1 if "failed" in outcomes else 0


def _serve(stop: StopFlag) -> int:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is for replies alone
    initialise_ranks(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stop.install()  # not earlier: a signal must end a worker that still waits for other ranks
    replies.write(json.dumps({"ready": True}) + "\n")
    requests = PipeReader(sys.stdin.fileno())
    while not stop.reason and not requests.is_ended:
        for line in requests.read(LISTEN_SECONDS):
            outcome = _work_fed(json.loads(line), stop)
            # A process that still holds an engine would lack its memory: others are started in its place.
            replies.write(json.dumps({"outcome": outcome, "is_spent": bool(engines_held())}) + "\n")
    return 0


def _work_fed(order: Any, stop: StopFlag) -> str:
    """Train the Runs of a list of directories, or do another order; return the outcome, or no_space."""
    outcome = "failed"
    try:
        if not isinstance(order, list):
            outcome = work_on(order, stop)
        else:
            for root, runs in group_by_series(map(Path, order)):
                outcome = train_series(runs, root, stop)
    except InputError as error:
        log.error("%s", error)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # The others wait for this rank, unless they have seen it too.
            raise SystemExit(2) from error
    except DiskFull as error:
        log.error("%s", error)
        outcome = "no_space"
    flush_or_drop()
    return outcome


def group_by_series(run_dirs: Iterable[Path]) -> list[tuple[Root, list[Run]]]:
    """Read the Runs of the directories and group them by Series, in the order given."""
    groups: dict[tuple[Path, str], list[Run]] = {}
    for folder in run_dirs:
        if scheduler_job() is not None:
            need_on_node(folder)
        run = read_run(folder.absolute())
        groups.setdefault((folder.absolute().parent.parent, run.series_id), []).append(run)
    return [(Root(path), runs) for (path, _), runs in groups.items()]


def train_series(runs: Sequence[Run], root: Root, stop: StopFlag, wanted: int | None = None) -> str:
    """Train the unfinished Runs of one Series; return finished, failed, preempted, or busy (another process trains it).

    Raises DiskFull if the disk is full; earlier checkpoints stay, and no Run counts as failed. The Runs fail if this is
    not one of the `wanted` ranks, or has not the device that was planned.
    """
    launch = read_launch(root, runs[0].series_id)
    if scheduler_job() is not None:  # else the Runs fail, and say so
        need_on_node(launch.corpus)
    ranks = initialise_ranks(launch.threads, launch, wanted)
    work = _SeriesWork(runs, root, launch, ranks, stop)
    try:
        with naming_a_full_disk(work.folder):
            return work.train()
    except DiskFull as full:
        if ranks.world == 1:
            raise
        # The other ranks may be waiting for this one: their supervisor ends them all.
        log.error("%s", full)
        raise SystemExit(EXIT_NO_SPACE) from full


class _SeriesWork:
    """One rank's share of training a Series."""

    def __init__(self, runs: Sequence[Run], root: Root, launch: Launch, ranks: Ranks, stop: StopFlag) -> None:
        self.runs, self.root, self.launch, self.ranks, self.stop = runs, root, launch, ranks, stop
        self.series_id = runs[0].series_id
        self.folder = root.series(self.series_id)
        given = [run.run_id for run in runs]
        self.work = WorkList(root, self.series_id, given, Control(launch.control))
        self.journal: Journal | None = None
        """Journal of the trunk, on the first rank alone."""
        self._held = engines_held()  # before this Series

    def train(self) -> str:
        """Train the Series unless another process does; return the outcome."""
        ranks, lock = self.ranks, SeriesLock(self.folder)
        make_folder(self.folder / "logs")
        with sent_to(self.folder / "logs" / f"rank-{ranks.rank}.log"):
            if not ranks.broadcast(not ranks.is_first or self._acquire(lock), bool):
                return "busy"
            try:
                outcomes = ["finished"]
                while runs := ranks.run_on_first(partial(self._last_look, lock), list[Run]):
                    self.runs = runs
                    with ExitStack() as stack:
                        self.heartbeat = stack.enter_context(Heartbeat(self.folder, ranks.rank))
                        if ranks.is_first:
                            stack.enter_context(mirrored_beside(self.launch, self.root, self.series_id))
                        outcomes.append(self._train_locked())
                    if outcomes[-1] in {"preempted", "busy"}:
                        return outcomes[-1]
                return "failed" if "failed" in outcomes else "finished"
            finally:
                free_memory()  # for the next Series
                lock.release()

    def _acquire(self, lock: SeriesLock) -> bool:
        """Lock the Series; False if another process trains it, after these Runs have joined that process's work."""
        if lock.acquire():
            return True
        study = study_of(self.root, self.launch.control)
        with self.work.locked():
            if lock.acquire():
                return True
            if study is not None:
                self.work.add(study, [run.run_id for run in self.runs])
        return False

    def _left(self) -> list[Run]:
        """Return the Runs, given or joined, that are neither over nor cancelled."""
        return [read_run(folder) for folder in self.work.left()]

    def _last_look(self, lock: SeriesLock) -> list[Run]:
        """Return the Runs that are left; release the lock of the Series if there is none."""
        with self.work.locked():  # a Run that joins later finds that no process trains the Series
            left = self._left()
            if not left:
                lock.release()
        return left

    def _train_locked(self) -> str:
        start = Event.RESUMED if read_progress(self.folder).attempt else Event.STARTED
        self.journal = Journal.open(self.folder) if self.ranks.is_first else None
        try:
            return self._train(start)
        except Exception as error:
            if not is_full(error):
                raise
            print_traceback()
            full = disk_full(self.folder, error)
            if self.journal is not None:
                self.journal.leave(Kind.DISK_FULL, str(full))
            if full is error:
                raise
            raise full from error
        finally:
            if self.journal is not None:
                self.journal.close()

    def _train(self, start: Event) -> str:
        self.before = {run.run_id: self._progress_of(run).attempt for run in self.runs}
        """Each Run's newest attempt when this training began with it."""
        device = self.ranks.device
        self.process = describe_process(self.launch) | {"device_name": device_name(device)}
        code, submitted = self.process["code"], self.launch.code
        try:
            self.ranks.check()
            while True:
                with self.heartbeat.counting(written_bytes):  # as compiling does
                    layout, changes = series_layout(self.root, self.runs, self.launch, self.ranks)
                facts = {**self.process, "layout": layout.model_dump(), "device": device}
                if self.journal is not None:
                    self.journal.append(start, **facts)
                    if code is not None and submitted not in {None, code}:
                        changes.insert(0, f"trained with the code {code}; {submitted} was submitted")
                    for text in changes:
                        self.journal.append(Event.WARNING, text=text)
                outcome = self._attempt(layout, facts)
                start = Event.RESUMED
                free_memory()  # for the next attempt
                if outcome is Outcome.DONE and (more := self.ranks.run_on_first(self._left, list[Run])):
                    log.info("series %s: %d more runs have joined or are retried", self.series_id, len(more))
                    self.runs = more
                    self.before |= {run.run_id: self._progress_of(run).attempt for run in more}
                    continue
                if outcome is not None:
                    break
                first, is_free = self.runs[0], engines_held() <= self._held
                reason = note_shortage(
                    first, layout, self.launch, self.ranks, self.folder, self.journal, is_free=is_free
                )
                if reason is not None:
                    log.error("series %s: %s", self.series_id, reason)
                    self.journal = self.journal or Journal.open(self.folder)
                    ending = self._fail(reason, Kind.OUT_OF_MEMORY)
                    # Other ranks may be waiting for this one.
                    return ending if self.ranks.world == 1 else sys.exit(1)
        except Diverged as error:  # every rank saw the same loss
            return self._fail(str(error), Kind.DIVERGED)
        except Exception as error:
            if is_full(error):
                raise
            if not isinstance(error, InputError | Fenced):
                print_traceback()
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            if (failure := node_failure_in(reason)) is not None:
                if scheduler_job() is not None:
                    raise NodeFailure(f"series {self.series_id}: {failure}") from error
                reason = f"{reason}; this machine has failed, and not the run"
            log.error("series %s: %s", self.series_id, reason)
            if self.ranks.world > 1 and self.ranks.problem is None:
                # The other ranks are at another step by now, and this error may be a consequence of their end and
                # not the cause: the supervisor ends all ranks and starts them again.
                raise SystemExit(1) from error
            return "busy" if isinstance(error, Fenced) else self._fail(reason, Kind.ERROR)
        if outcome in {Outcome.PREEMPTED, Outcome.FENCED}:
            return "preempted" if outcome is Outcome.PREEMPTED else "busy"
        if self.journal is not None:
            self.journal.append(Event.FINISHED)
        states = [self._progress_of(run).state for run in self.runs]
        return "failed" if Event.FAILED in states else "finished"

    def _attempt(self, layout: Layout, facts: Mapping[str, Any]) -> Outcome | None:
        """Train on a layout; return None if memory ran out. Nothing refers to the engine afterwards."""
        try:
            with SeriesTrainer(
                self.root,
                self.runs,
                self.launch,
                self.ranks,
                layout,
                self.stop,
                self.heartbeat,
                facts,
                self.work,
            ) as trainer:
                return trainer.train(self.journal)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.error("out of memory: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
            return None

    def _fail(self, reason: str, kind: Kind) -> str:
        """Record a failure in the trunk's journal and in those of its Runs; return the outcome.

        Runs that have ended since this training began keep their own outcome, and cancelled ones stay cancelled.
        """
        if self.journal is None:
            return "failed"
        try:
            self.journal.append(Event.FAILED, reason=reason, kind=kind)
        except Fenced:  # another process trains these Runs by now: they have not failed
            return "busy"
        cancelled = self.work.cancelled()
        for run in self.runs:
            own = self._progress_of(run)
            failed = own.state == Event.FAILED and own.attempt > self.before[run.run_id]
            if own.state != Event.FINISHED and not failed and run.run_id not in cancelled:
                with Journal.open(self.root.run(run.run_id)) as latest:
                    latest.append(Event.FAILED, reason=reason, kind=kind)
        return "failed"

    def _progress_of(self, run: Run) -> Progress:
        return read_progress(self.root.run(run.run_id))


def describe_process(launch: Launch) -> dict[str, Any]:
    """Return the process, versions, code and dispatcher, for a journal's first line."""
    job, share = scheduler_job(), os.environ.get(GPU_SHARE)
    return {
        **identify_process(),
        "dispatcher": launch.dispatcher,
        "job_id": job.job_id if job else str(os.getpid()),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in ("ssmscale", "torch", "deepspeed")},
        "commit": commit(),
        "code": running_code(),
        **({"gpu_share": float(share)} if share else {}),
    }


if __name__ == "__main__":
    end_at_once(main())
