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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from harness.common.disk import DiskFull, disk_full, is_full, make_folder, naming_a_full_disk
from harness.common.process import (
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
from harness.record.journal import Event, Fenced, Journal, read_progress
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
    is_out_of_memory,
)
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.worker")


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
    try:
        if options.feed:
            stop_when_parent_ends()
            return _serve(stop)
        stop.install()
        status = _run_all(options.run_dirs, stop)
        # A rank that ends with another status has the rest killed, before they have closed what they hold.
        return 0 if options.supervised and status in {1, EXIT_PREEMPTED} else status
    except InputError as error:
        log.error("%s", error)
        return 2
    except DiskFull as error:
        log.error("%s", error)
        return EXIT_NO_SPACE
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
    for line in _lines(sys.stdin.fileno(), stop):
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
    """Train what is missing of one Series: finished, failed, preempted, or busy where another process has it.

    Raises DiskFull where there was no room to go on; what was saved before is kept, and no Run counts as failed.
    """
    folder = root.series(runs[0].series_id)
    launch = read_launch(root, runs[0].series_id)
    ranks = initialise_ranks(launch.threads)
    try:
        with naming_a_full_disk(folder):
            return _train_logged(runs, root, launch, ranks, stop)
    except DiskFull as full:
        if ranks.world == 1:
            raise
        # The others may be waiting for this rank: whoever started the ranks ends them all.
        log.error("%s", full)
        raise SystemExit(EXIT_NO_SPACE) from full


def _train_logged(runs: Sequence[Run], root: Root, launch: Launch, ranks: Ranks, stop: StopFlag) -> str:
    folder = root.series(runs[0].series_id)
    lock = SeriesLock(folder)
    make_folder(folder / "logs")
    with sent_to(folder / "logs" / f"rank-{ranks.rank}.log"):
        if not ranks.tell(not ranks.is_first or lock.acquire()):
            return "busy"
        try:
            states = ranks.tell([read_progress(root.run(run.run_id)).state for run in runs])
            missing = [run for run, state in zip(runs, states, strict=True) if state != Event.FINISHED]
            cancelled = ranks.tell(Control(launch.control).cancelled())
            # What was cancelled while it waited comes here too: no engine is built for it.
            if cancelled.issuperset(run.run_id for run in missing):
                return "finished"
            with mirrored_beside(launch, root, runs[0].series_id) if ranks.is_first else nullcontext():
                return _train_locked(missing, root, launch, ranks, stop)
        finally:
            gc.collect()  # an engine refers to itself: its memory is wanted by the next Series
            lock.release()


def _train_locked(runs: Sequence[Run], root: Root, launch: Launch, ranks: Ranks, stop: StopFlag) -> str:
    folder = root.series(runs[0].series_id)
    start = Event.RESUMED if read_progress(folder).attempt else Event.STARTED
    journal = Journal.open(folder) if ranks.is_first else None
    try:
        return _train(runs, root, launch, ranks, stop, journal, start)
    except Exception as error:
        if not is_full(error):
            raise
        print_traceback()
        full = disk_full(folder, error)
        if journal is not None:
            journal.leave(Kind.DISK_FULL, str(full))
        if full is error:
            raise
        raise full from error
    finally:
        if journal is not None:
            journal.close()


def _train(
    runs: Sequence[Run],
    root: Root,
    launch: Launch,
    ranks: Ranks,
    stop: StopFlag,
    journal: Journal | None,
    start: Event,
) -> str:
    before = {run.run_id: read_progress(root.run(run.run_id)).attempt for run in runs}
    process = describe_process(launch) | {"device_name": device_name(ranks.device)}
    try:
        while True:
            layout, changes = series_layout(root, runs, launch, ranks)
            if journal is not None:
                journal.append(start, **process, layout=layout.model_dump(), device=ranks.device)
                if process["code"] is not None and launch.code not in {None, process["code"]}:
                    text = (
                        f"trained with the code {process['code']}, not with {launch.code} as it was submitted"
                    )
                    journal.append(Event.WARNING, text=text)
                for change in changes:
                    journal.append(Event.WARNING, text=change)
            outcome = _attempt(runs, root, launch, ranks, layout, stop, process, journal)
            if outcome is not None:
                break
            gc.collect()  # what the attempt held is wanted by the next
            reason = _out_of_memory(runs[0], root, launch, ranks, layout, process, journal)
            if reason is not None:
                log.error("series %s: %s", runs[0].series_id, reason)
                told = journal or Journal.open(root.series(runs[0].series_id))
                ending = _fail(runs, root, launch, told, reason, Kind.OUT_OF_MEMORY, before)
                return ending if ranks.world == 1 else sys.exit(1)  # the others may wait for this rank
            start = Event.RESUMED
    except Diverged as error:  # every rank saw the same loss
        return _fail(runs, root, launch, journal, str(error), Kind.DIVERGED, before)
    except Exception as error:
        if is_full(error):
            raise
        if not isinstance(error, InputError | Fenced):
            print_traceback()
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        log.error("series %s: %s", runs[0].series_id, reason)
        if ranks.world > 1:
            # The others are somewhere else now, and what the first rank sees may be their end and not the cause:
            # whoever started the ranks ends them all and tries again.
            raise SystemExit(1) from error
        if isinstance(error, Fenced):
            return "busy"
        return _fail(runs, root, launch, journal, reason, Kind.ERROR, before)
    if outcome in {Outcome.PREEMPTED, Outcome.FENCED}:
        return "preempted" if outcome is Outcome.PREEMPTED else "busy"
    if journal is not None:
        journal.append(Event.FINISHED)
    states = [read_progress(root.run(run.run_id)).state for run in runs]
    return "failed" if Event.FAILED in states else "finished"


def _attempt(
    runs: Sequence[Run],
    root: Root,
    launch: Launch,
    ranks: Ranks,
    layout: Layout,
    stop: StopFlag,
    process: Mapping[str, Any],
    journal: Journal | None,
) -> Outcome | None:
    """Train on a layout; None where memory was short, by when nothing refers to what was held any more."""
    try:
        return SeriesTrainer(root, runs, launch, ranks, layout, stop, process).train(journal)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.error("out of memory: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
        return None


def _out_of_memory(
    run: Run,
    root: Root,
    launch: Launch,
    ranks: Ranks,
    layout: Layout,
    process: Mapping[str, Any],
    journal: Journal | None,
) -> str | None:
    """Remember that a micro-batch did not fit; returns why the Series fails where there is no smaller one.

    Of several ranks the others may wait for this one: all are ended, and their next start heeds what is remembered.
    """
    remember(launch.control.parent, run, layout, ranks.device, process["device_name"])
    folder = root.series(run.series_id)
    text = f"{OUT_OF_MEMORY} with micro-batch {layout.micro_batch} on rank {ranks.rank}"
    if layout.micro_batch == 1:
        return what_would_fit(run, layout, on_cuda=ranks.device.startswith("cuda"))
    if ranks.world == 1:
        if journal is not None:
            journal.append(Event.WARNING, text=f"{text}: goes on from the last checkpoint with a smaller one")
        return None
    log.error("series %s: %s", run.series_id, text)
    (journal or Journal.open(folder)).leave(Kind.OUT_OF_MEMORY, text)
    raise SystemExit(EXIT_PREEMPTED)


def _fail(
    runs: Sequence[Run],
    root: Root,
    launch: Launch,
    journal: Journal | None,
    reason: str,
    kind: Kind,
    before: Mapping[str, int],
) -> str:
    """Write the reason into the trunk's journal and into that of every Run it takes with it; returns the outcome.

    `before` holds each Run's attempts when this training began: those that ended since have their own word, and
    cancelled ones stay cancelled.
    """
    if journal is None:
        return "failed"
    try:
        journal.append(Event.FAILED, reason=reason, kind=kind)
    except Fenced:  # somebody else trains these Runs by now, and they have not failed
        return "busy"
    cancelled = Control(launch.control).cancelled()
    for run in runs:
        own = read_progress(root.run(run.run_id))
        failed = own.state == Event.FAILED and own.attempt > before[run.run_id]
        if own.state != Event.FINISHED and not failed and run.run_id not in cancelled:
            with Journal.open(root.run(run.run_id)) as latest:
                latest.append(Event.FAILED, reason=reason, kind=kind)
    return "failed"


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
