"""From a study to trained Runs: register it, write what workers need, hand Series over, and see them through.

Submitting is idempotent. What is finished is reused, what another process trains is waited for, what is missing
is trained, longest Series first. Everything is checked before the first file is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property

from harness.common.disk import DISK_THREADS, side_by_side, write_atomically
from harness.common.process import identify_process
from harness.dispatch.base import Dispatcher, Job
from harness.dispatch.supervise import InHand
from harness.plan.estimate import read_text_positions
from harness.plan.plan import Plan, PlannedRun
from harness.plan.speed import write_calibration
from harness.record.control import Control
from harness.record.jobs import SchedulerGone
from harness.record.journal import read_progress
from harness.record.provenance import record_code
from harness.record.registry import ResolvedStudy
from harness.record.root import Launch, Root, write_launch, write_run, write_series
from harness.record.status import RunState, RunStatus, StatusReader
from harness.submit.claims import Claims
from harness.tracking.store import sidecar_uri


def keep_plan(root: Root, plan: Plan) -> None:
    """Keep what was planned when it was submitted, beside the study."""
    path = root.study(plan.study.name) / "plan.json"
    write_atomically(path, json.dumps(plan.as_json(), indent=1, allow_nan=False) + "\n")


def keep_calibration(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
    """Keep how long the steps of finished Runs took, for this study's next plan and for those of others."""
    study, text = resolved.study, resolved.points[0].run.model.text
    positions = read_text_positions(study, text, resolved.corpus)
    write_calibration(resolved.root, study.name, rows, positions)


class Submission:
    """One foreground submission: rounds of handing over what is missing, until nothing is."""

    def __init__(
        self,
        resolved: ResolvedStudy,
        plan: Plan,
        dispatcher: Dispatcher | None,
        dispatcher_name: str,
        *,
        sidecars: bool = True,
    ) -> None:
        self.sidecars = sidecars and dispatcher_name != "local"
        """Whether jobs mirror their Series by themselves, and not this process."""
        self.resolved, self.plan, self.dispatcher, self.name = resolved, plan, dispatcher, dispatcher_name
        self.root = resolved.root
        self.reader = StatusReader(self.root, resolved.study.name)
        self.control = Control(self.root.study(resolved.study.name) / "control.jsonl")
        self.process = identify_process()
        self.left: dict[str, str] = {}
        """Series that this submission left to a scheduler's jobs, which train them or will, and for which study."""
        self._ours: set[str] = set()
        """Series that no job had claimed when they were last asked for."""
        self._submitted: list[str] = []

    @cached_property
    def code(self) -> str:
        """State of the code that is submitted, recorded beside the study."""
        return record_code(self.root.study(self.resolved.study.name))

    def run(self, on_progress: Callable[[Sequence[RunStatus]], None]) -> list[RunStatus]:
        """Train what is missing, wait for what others train here, and return how every Run ended.

        What a scheduler's job has claimed is left to it; where that job is over when all else is, it is trained here.
        Raises DiskFull as soon as a worker says that no room is left: nothing more is handed over.
        """
        assert self.dispatcher is not None
        in_hand = InHand(self.root, self.control, self.dispatcher)
        while True:
            rows = self.reader.read(self.resolved.points, submitter=self.process)
            on_progress(rows)
            untrained = [row for row in rows if row.state in {RunState.NEW, RunState.INTERRUPTED}]
            missing = [row for row in untrained if row.series_id not in self.left]
            others = any(row.state in {RunState.QUEUED, RunState.RUNNING} for row in rows)
            is_last = in_hand.is_empty and not missing and not others
            wanted = untrained if is_last else [row for row in missing if in_hand.takes(row.series_id)]
            jobs = self.leave_claimed(self.prepare(wanted)) if wanted else []
            if is_last and not jobs:
                keep_calibration(self.resolved, rows)
                return rows
            if jobs:
                self.launch(jobs)
                self.tell_submitted([folder.name for job in jobs for folder in job.run_dirs])
                in_hand.hand_over(jobs)
            in_hand.watch()

    def leave_claimed(self, jobs: Sequence[Job]) -> list[Job]:
        """These jobs without those whose Series a scheduler's job has claimed, which are kept in `left`.

        Raises SchedulerGone where SLURM is here and does not say whether its jobs are over. Of Series of which it has
        said so its last word holds then: what is trained here goes on.
        """
        series_ids = {job.series_id for job in jobs}
        try:
            held = Claims(self.root).held(sorted(series_ids))
        except SchedulerGone:
            if shutil.which("squeue") is not None and not series_ids <= self._ours | self.left.keys():
                raise
            # On no cluster's login node none has said anything, and the journals tell what is known.
            held = {key: study for key, study in self.left.items() if key in series_ids}
        self.left = {key: study for key, study in self.left.items() if key not in series_ids} | held
        self._ours |= series_ids - held.keys()
        return [job for job in jobs if job.series_id not in held]

    def tell_submitted(self, wanted: list[str]) -> None:
        """Note in control.jsonl that this process has Runs trained, once for the same ones."""
        if wanted != self._submitted:
            self.control.append(
                "submitted", runs=wanted, process=self.process, dispatcher=self.name, code=self.code
            )
            self._submitted = wanted

    def prepare(self, missing: Sequence[RunStatus]) -> list[Job]:
        """Write what these Runs are, the same for every study; returns their Series as jobs, the longest first."""
        planned = {run.status.run_id: run for run in self.plan.runs}
        groups: dict[str, list[PlannedRun]] = {}
        for row in missing:
            groups.setdefault(row.series_id, []).append(planned[row.run_id])

        def write(series_id: str) -> None:
            runs = groups[series_id]
            write_series(self.root, runs[0].status.point.run)
            for run in runs:
                write_run(self.root, run.status.point.run)

        side_by_side(write, groups, DISK_THREADS)
        longest_first = sorted(groups, key=lambda key: -sum(run.gpu_hours for run in groups[key]))
        return [self._job(series_id, groups[series_id]) for series_id in longest_first]

    def launch(self, jobs: Sequence[Job]) -> None:
        """Say how these Series are to be started: for a study of ours, so only where nobody else has them."""
        first = {job.run_dirs[0].name: job.series_id for job in jobs}
        launches = {
            first[run.status.run_id]: self._launch(run)
            for run in self.plan.runs
            if run.status.run_id in first
        }

        def write(series_id: str) -> None:
            write_launch(self.root, series_id, launches[series_id])

        side_by_side(write, launches, DISK_THREADS)

    def _launch(self, planned: PlannedRun) -> Launch:
        study = self.resolved.study
        return Launch(
            corpus=study.corpus.path.absolute(),
            text_encoder=None if study.text.encoder == "bytes" else study.text.encoder,
            control=self.control.path.absolute(),
            dispatcher=self.name,
            zero_stage=planned.layout.zero_stage,
            micro_batch=planned.layout.micro_batch,
            threads=planned.layout.threads,
            activation_checkpointing=planned.layout.activation_checkpointing,
            log_every=study.tracking.log_every,
            checkpoint_every=study.resources.checkpoint_every,
            keep_last=study.resources.keep_last,
            keep_best=study.resources.keep_best,
            eval_every=study.tracking.eval_every,
            peak_flops=planned.size.peak_flops,
            code=self.code,
            tracking=sidecar_uri(study, self.root) if self.sidecars else None,
        )

    def _job(self, series_id: str, runs: Sequence[PlannedRun]) -> Job:
        ordered = sorted(runs, key=lambda run: run.status.point.run.iterations)
        # The plan counts one a Series; on warm ranks there is none.
        start = runs[0].size.duration.start.expected
        return Job(
            series_id=series_id,
            run_dirs=tuple(self.root.run(run.status.run_id).absolute() for run in ordered),
            nodes=runs[0].size.nodes,
            ranks=runs[0].layout.ranks,
            threads=runs[0].layout.threads,
            log_dir=self.root.series(series_id) / "logs",
            gpu_fraction=runs[0].size.resources.gpu_fraction if runs[0].layout.ranks == 1 else 1.0,
            seconds=max(0.0, 3600 * sum(run.hours.expected for run in runs) - start),
            architecture=runs[0].status.point.architecture,
        )


def cancel(root: Root, study_name: str, rows: Sequence[RunStatus]) -> list[RunStatus]:
    """Cancel Runs that are not over: workers skip them and leave at the next step. Returns those it concerns."""
    concerned = [row for row in rows if row.state not in {RunState.DONE, RunState.FAILED, RunState.CANCELLED}]
    if concerned:
        Control(root.study(study_name) / "control.jsonl").append(
            "cancelled", runs=[row.run_id for row in concerned]
        )
    return concerned


def forgive(root: Root, study_name: str, rows: Sequence[RunStatus]) -> list[RunStatus]:
    """Forget failures and cancellations, so that the next submission trains these Runs. Returns those it concerns."""
    concerned = [row for row in rows if row.state in {RunState.FAILED, RunState.CANCELLED}]
    if concerned:
        Control(root.study(study_name) / "control.jsonl").append(
            "retried",
            runs=[row.run_id for row in concerned],
            attempts={row.run_id: read_progress(root.run(row.run_id)).attempt for row in concerned},
        )
    return concerned
