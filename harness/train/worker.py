"""What every job executes, whoever started it: train the Runs of the directories it is given.

    python -m harness.train.worker RUN_DIR...         one process, or as many ranks as torchrun or a scheduler starts
    python -m harness.train.worker --feed             one JSON list of run directories a line on standard input
    python -m harness.train.worker --supervised RUN_DIR...   under a supervisor that reads the journals (slurm.job)

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
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from harness.common.disk import DiskFull, disk_full, is_full, make_folder, naming_a_full_disk
from harness.common.process import (
    PipeReader,
    end_at_once,
    flush_or_drop,
    identify_process,
    log_to_stderr,
    print_traceback,
    sent_to,
    stop_when_parent_ends,
)
from harness.plan.resources import remember, what_would_fit
from harness.record.control import Control
from harness.record.journal import Event, Fenced, Journal, Progress, read_progress
from harness.record.kinds import OUT_OF_MEMORY, Kind
from harness.record.provenance import commit, installed_version, running_code
from harness.record.root import Launch, Layout, Root, read_launch, read_run
from harness.record.series import SeriesLock, scheduler_job
from harness.study.run import Run
from harness.tracking.live import mirrored_beside
from harness.train.layout import series_layout
from harness.train.loop import Diverged, Outcome, SeriesTrainer
from harness.train.ranks import Ranks, device_name, initialise_ranks
from harness.train.stopping import (
    EXIT_NO_SPACE,
    EXIT_PREEMPTED,
    GPU_SHARE,
    StopFlag,
    exit_status,
    is_out_of_memory,
)
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.worker")

LISTEN_SECONDS = 0.2
"""How long an idle worker takes, at most, to find that it was asked to stop."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker; returns its exit status: 0 done, 1 some Run failed, 2 bad input, 74 disk full, 75 preempted."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.train.worker", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR")
    parser.add_argument("--feed", action="store_true", help="read run directories from standard input")
    parser.add_argument(
        "--supervised", action="store_true", help="end with 0 wherever the journals tell the outcome"
    )
    options = parser.parse_args(arguments)
    if not options.feed and not options.run_dirs:
        parser.error("give RUN_DIRs, or --feed")
    log_to_stderr()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    running_code()  # now: what lies on disk may be edited while this process waits for its next Series
    stop = StopFlag()

    def run() -> int:
        if options.feed:
            stop_when_parent_ends()
            return _serve(stop)
        stop.install()
        status = _run_all(options.run_dirs, stop)
        # A rank that ends with another status has the rest killed, before they have closed what they hold.
        return 0 if options.supervised and status in {1, EXIT_PREEMPTED} else status

    try:
        return exit_status(run, log)
    finally:
        flush_or_drop()


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
    told = PipeReader(sys.stdin.fileno())
    while not stop.reason and not told.is_ended:
        for line in told.read(LISTEN_SECONDS):
            outcome = _train_fed([Path(name) for name in json.loads(line)], stop)
            replies.write(json.dumps({"outcome": outcome}) + "\n")
    return 0


def _train_fed(run_dirs: Sequence[Path], stop: StopFlag) -> str:
    """Train the Runs of these directories, in a process that stays: what `train_series` returns, or no_space."""
    outcome = "failed"
    try:
        for root, runs in group_by_series(run_dirs):
            outcome = train_series(runs, root, stop)
    except InputError as error:
        log.error("%s", error)
    except DiskFull as error:
        log.error("%s", error)
        outcome = "no_space"
    flush_or_drop()
    return outcome


def group_by_series(run_dirs: Iterable[Path]) -> list[tuple[Root, list[Run]]]:
    """The Runs of the directories, those of one Series together, in the order given."""
    groups: dict[tuple[Path, str], list[Run]] = {}
    for folder in run_dirs:
        run = read_run(folder.absolute())
        groups.setdefault((folder.absolute().parent.parent, run.series_id), []).append(run)
    return [(Root(path), runs) for (path, _), runs in groups.items()]


def train_series(runs: Sequence[Run], root: Root, stop: StopFlag) -> str:
    """Train what is missing of one Series: finished, failed, preempted, or busy where another process has it.

    Raises DiskFull where there was no room to go on; what was saved before is kept, and no Run counts as failed.
    """
    launch = read_launch(root, runs[0].series_id)
    ranks = initialise_ranks(launch.threads)
    work = _SeriesWork(runs, root, launch, ranks, stop)
    try:
        with naming_a_full_disk(work.folder):
            return work.train()
    except DiskFull as full:
        if ranks.world == 1:
            raise
        # The others may be waiting for this rank: whoever started the ranks ends them all.
        log.error("%s", full)
        raise SystemExit(EXIT_NO_SPACE) from full


class _SeriesWork:
    """What one rank does to train what is missing of a Series."""

    def __init__(self, runs: Sequence[Run], root: Root, launch: Launch, ranks: Ranks, stop: StopFlag) -> None:
        self.runs, self.root, self.launch, self.ranks, self.stop = runs, root, launch, ranks, stop
        self.series_id = runs[0].series_id
        self.folder = root.series(self.series_id)
        self.journal: Journal | None = None
        """The trunk's, on the first rank alone."""

    def train(self) -> str:
        """Train the Series where no other process does; returns the outcome."""
        ranks, lock = self.ranks, SeriesLock(self.folder)
        make_folder(self.folder / "logs")
        with sent_to(self.folder / "logs" / f"rank-{ranks.rank}.log"):
            if not ranks.broadcast(not ranks.is_first or lock.acquire()):
                return "busy"
            try:
                states = ranks.broadcast([self._progress_of(run).state for run in self.runs])
                self.runs = [
                    run for run, state in zip(self.runs, states, strict=True) if state != Event.FINISHED
                ]
                cancelled = ranks.broadcast(Control(self.launch.control).cancelled())
                # What was cancelled while it waited comes here too: no engine is built for it.
                if cancelled.issuperset(run.run_id for run in self.runs):
                    return "finished"
                mirror = (
                    mirrored_beside(self.launch, self.root, self.series_id)
                    if ranks.is_first
                    else nullcontext()
                )
                with mirror:
                    return self._train_locked()
            finally:
                gc.collect()  # an engine refers to itself: its memory is wanted by the next Series
                lock.release()

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
        """Each Run's attempts when this training began."""
        device = self.ranks.device
        self.process = describe_process(self.launch) | {"device_name": device_name(device)}
        try:
            while True:
                layout, changes = series_layout(self.root, self.runs, self.launch, self.ranks)
                if self.journal is not None:
                    self.journal.append(start, **self.process, layout=layout.model_dump(), device=device)
                    for text in (*self._other_code(), *changes):
                        self.journal.append(Event.WARNING, text=text)
                outcome = self._attempt(layout)
                if outcome is not None:
                    break
                gc.collect()  # what the attempt held is wanted by the next
                reason = self._out_of_memory(layout)
                if reason is not None:
                    log.error("series %s: %s", self.series_id, reason)
                    self.journal = self.journal or Journal.open(self.folder)
                    ending = self._fail(reason, Kind.OUT_OF_MEMORY)
                    # The others may wait for this rank.
                    return ending if self.ranks.world == 1 else sys.exit(1)
                start = Event.RESUMED
        except Diverged as error:  # every rank saw the same loss
            return self._fail(str(error), Kind.DIVERGED)
        except Exception as error:
            if is_full(error):
                raise
            if not isinstance(error, InputError | Fenced):
                print_traceback()
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            log.error("series %s: %s", self.series_id, reason)
            if self.ranks.world > 1:
                # The others are somewhere else now, and what the first rank sees may be their end and not the cause:
                # whoever started the ranks ends them all and tries again.
                raise SystemExit(1) from error
            return "busy" if isinstance(error, Fenced) else self._fail(reason, Kind.ERROR)
        if outcome in {Outcome.PREEMPTED, Outcome.FENCED}:
            return "preempted" if outcome is Outcome.PREEMPTED else "busy"
        if self.journal is not None:
            self.journal.append(Event.FINISHED)
        states = [self._progress_of(run).state for run in self.runs]
        return "failed" if Event.FAILED in states else "finished"

    def _other_code(self) -> Iterator[str]:
        """Say where what trains is not the code that was submitted."""
        code, submitted = self.process["code"], self.launch.code
        if code is not None and submitted not in {None, code}:
            yield f"trained with the code {code}, not with {submitted} as it was submitted"

    def _attempt(self, layout: Layout) -> Outcome | None:
        """Train on a layout; None where memory was short, by when nothing refers to what was held any more."""
        try:
            return SeriesTrainer(
                self.root, self.runs, self.launch, self.ranks, layout, self.stop, self.process
            ).train(self.journal)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.error("out of memory: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
            return None

    def _out_of_memory(self, layout: Layout) -> str | None:
        """Remember that a micro-batch did not fit; returns why the Series fails where there is no smaller one.

        Of several ranks the others may wait for this one: all are ended, and their next start heeds what is remembered.
        """
        run, device = self.runs[0], self.ranks.device
        remember(self.launch.control.parent, run, layout, device, self.process["device_name"])
        text = f"{OUT_OF_MEMORY} with micro-batch {layout.micro_batch} on rank {self.ranks.rank}"
        if layout.micro_batch == 1:
            return what_would_fit(run, layout, on_cuda=device.startswith("cuda"))
        if self.ranks.world == 1:
            if self.journal is not None:
                text = f"{text}: goes on from the last checkpoint with a smaller one"
                self.journal.append(Event.WARNING, text=text)
            return None
        log.error("series %s: %s", self.series_id, text)
        (self.journal or Journal.open(self.folder)).leave(Kind.OUT_OF_MEMORY, text)
        raise SystemExit(EXIT_PREEMPTED)

    def _fail(self, reason: str, kind: Kind) -> str:
        """Write the reason into the trunk's journal and into that of every Run it takes with it; returns the outcome.

        Runs that have ended since this training began have their own word, and cancelled ones stay cancelled.
        """
        if self.journal is None:
            return "failed"
        try:
            self.journal.append(Event.FAILED, reason=reason, kind=kind)
        except Fenced:  # somebody else trains these Runs by now, and they have not failed
            return "busy"
        cancelled = Control(self.launch.control).cancelled()
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
    """Who trains: process, versions, code and dispatcher, for a journal's first line."""
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
