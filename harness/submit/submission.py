"""The one way from a plan to tasks in a backend's hands: prepare, lease, hand over, then supervise or return.

Submitting is idempotent. What is finished is reused, what others train is left to them, what is missing is trained,
longest Series first. Two submissions at once, or one killed half-way and made again, hand every Series over once: a
Series is leased before the batch that holds it is submitted to a backend that outlives this process, and the lease is
free again only when its job has ended or is known never to have existed. Everything is checked before the first file
is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from harness.common.disk import DISK_THREADS, side_by_side, write_atomically
from harness.common.format import NOTHING
from harness.common.process import identify_process
from harness.dispatch.arrays import new_name
from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.dispatch.supervise import JobSupervisor
from harness.plan.allocation import share_out
from harness.plan.cluster import lasting_name
from harness.plan.estimate import read_text_positions
from harness.plan.plan import Plan, PlannedRun
from harness.plan.speed import write_calibration
from harness.record.control import Control
from harness.record.jobs import SchedulerUnavailable
from harness.record.provenance import record_code
from harness.record.registry import ResolvedStudy
from harness.record.root import Launch, Root, write_launch, write_run, write_series
from harness.record.status import RunState, RunStatus, StatusReader
from harness.submit.leases import Leases
from harness.tracking.store import sidecar_uri


def hand_over(resolved: ResolvedStudy, plan: Plan, backends: Sequence[Backend]) -> list[HandedOver]:
    """Hand what is missing to backends that outlive this process: what each of them was given."""
    shares = {backends[0]: plan.missing}
    if len(backends) > 1:  # the others pack what needs less than a node
        target = backends[0].target
        assert target.profile is not None
        packed, apart = share_out(plan.missing, target.profile, target.on)
        shares = {backend: packed if backend.is_packed else apart for backend in backends}
    done = []
    for backend, runs in shares.items():
        if runs:
            with backend:
                done.append(Submission(resolved, plan, backend).hand_over([run.status for run in runs]))
    return done


@dataclass(frozen=True)
class HandedOver:
    """Series that a submission handed to a backend, and those it did not."""

    backend: Backend
    handles: tuple[Handle, ...] = ()
    taken: int = 0
    """Series that another submission had leased."""
    waiting: int = 0
    """Series for which the backend has no room now."""

    @property
    def runs(self) -> list[str]:
        """Runs of the Series that were handed over."""
        return names_of([handle.task for handle in self.handles])

    @property
    def jobs(self) -> list[str]:
        """The scheduler's number of each batch."""
        return list(dict.fromkeys(number_of(handle) for handle in self.handles))


class Submission:
    """A study on its way to one backend."""

    def __init__(
        self, resolved: ResolvedStudy, plan: Plan, backend: Backend, *, sidecars: bool = True
    ) -> None:
        """sidecars: whether tasks that outlive this process mirror their Series by themselves."""
        self.resolved, self.plan, self.backend = resolved, plan, backend
        self.sidecars = sidecars and backend.outlives
        self.root = resolved.root
        self.control = Control(self.root.study(resolved.study.name) / "control.jsonl")
        self.process = identify_process()
        self.left: dict[str, str] = {}
        """Series that this submission left to a scheduler's jobs, which train them or will, and for which study."""
        self._ours: set[str] = set()
        """Series that no job had leased when they were last asked for."""
        self._submitted: list[str] = []

    @cached_property
    def code(self) -> str:
        """State of the code that is submitted, recorded beside the study."""
        return record_code(self.root.study(self.resolved.study.name))

    def hand_over(self, missing: Sequence[RunStatus]) -> HandedOver:
        """Submit the Series of these Runs that no other submission has leased. Raises SchedulerUnavailable."""
        tasks = self.prepare(missing)
        leases, room = Leases(self.root), self.backend.room(len(tasks))
        handles: list[Handle] = []
        taken = 0
        for members in self.backend.batches(tasks):
            name, wanted = new_name(), members[: room - len(handles)]
            ours = self._lease(leases, name, wanted)
            taken += len(wanted) - len(ours)
            if ours:
                self.launch(ours)
                batch = self.backend.submit(ours, name)
                self._record(batch)
                handles += batch
        return HandedOver(self.backend, tuple(handles), taken, len(tasks) - len(handles) - taken)

    def supervise(self, on_progress: Callable[[Sequence[RunStatus]], None]) -> list[RunStatus]:
        """Train what is missing, wait for what others train here, and return how every Run ended.

        What a scheduler's job has leased is left to it; where that job is over when all else is, it is trained here.
        Raises DiskFull as soon as a worker says that no room is left: nothing more is handed over.
        """
        reader = StatusReader(self.root, self.resolved.study.name)
        supervisor = JobSupervisor(self.control, self.backend)
        while True:
            rows = reader.read(self.resolved.points, submitter=self.process)
            on_progress(rows)
            untrained = [row for row in rows if row.state in {RunState.NEW, RunState.INTERRUPTED}]
            missing = [row for row in untrained if row.series_id not in self.left]
            others = any(row.state in {RunState.QUEUED, RunState.RUNNING} for row in rows)
            is_last = supervisor.is_empty and not missing and not others
            wanted = untrained if is_last else [row for row in missing if supervisor.takes(row.series_id)]
            handles = self.hand_over(wanted).handles if wanted else ()
            if is_last and not handles:
                keep_calibration(self.resolved, rows)
                return rows
            supervisor.watch_over(handles)
            supervisor.watch()

    def prepare(self, missing: Sequence[RunStatus]) -> list[Task]:
        """Write what these Runs are, the same for every study; returns their Series as tasks, the longest first."""
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
        return [self._task(series_id, groups[series_id]) for series_id in longest_first]

    def launch(self, tasks: Sequence[Task]) -> None:
        """Say how these Series are to be started: for a study of ours, so only where no other has them."""
        first = {task.run_dirs[0].name: task.series_id for task in tasks}
        launches = {
            first[run.status.run_id]: self._launch(run)
            for run in self.plan.runs
            if run.status.run_id in first
        }

        def write(series_id: str) -> None:
            write_launch(self.root, series_id, launches[series_id])

        side_by_side(write, launches, DISK_THREADS)

    def leave_leased(self, tasks: Sequence[Task], leases: Leases) -> list[Task]:
        """Return these tasks without those whose Series a scheduler's job has leased, which are kept in `left`.

        Raises SchedulerUnavailable where a scheduler is here and does not say whether its jobs are over. Of Series of
        which it has said so its last word holds then: what is trained here goes on.
        """
        series_ids = {task.series_id for task in tasks}
        try:
            held = leases.held(sorted(series_ids))
        except SchedulerUnavailable as silence:
            if silence.is_here and not series_ids <= self._ours | self.left.keys():
                raise
            # On no cluster's login node none has said anything, and the journals tell what is known.
            held = {key: study for key, study in self.left.items() if key in series_ids}
        self.left = {key: study for key, study in self.left.items() if key not in series_ids} | held
        self._ours |= series_ids - held.keys()
        return [task for task in tasks if task.series_id not in held]

    def _lease(self, leases: Leases, name: str, tasks: Sequence[Task]) -> list[Task]:
        """Return those of these tasks that are this submission's to hand over.

        What this process supervises itself needs no lease: its workers hold the locks of their Series.
        """
        if self.backend.outlives:
            return leases.take_all(self.resolved.study.name, name, tasks)
        return self.leave_leased(tasks, leases)

    def _record(self, handles: Sequence[Handle]) -> None:
        """Note in control.jsonl what a backend was given, and what the user said of where it is to go.

        A process that supervises its tasks itself notes the same ones once.
        """
        runs, target = names_of([handle.task for handle in handles]), self.backend.target
        if self.backend.outlives:
            more = {"on": target.on, "job_id": number_of(handles[0]), "code": self.code, **said_of(target)}
            self.control.append("submitted", runs=runs, dispatcher=self.backend.name, **more)
        elif runs != self._submitted:
            self.control.append(
                "submitted", runs=runs, process=self.process, dispatcher=self.backend.name, code=self.code
            )
            self._submitted = runs

    def _launch(self, planned: PlannedRun) -> Launch:
        study = self.resolved.study
        return Launch(
            corpus=study.corpus.path.absolute(),
            text_encoder=None if study.text.encoder == "bytes" else study.text.encoder,
            control=self.control.path.absolute(),
            dispatcher=self.backend.name,
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

    def _task(self, series_id: str, runs: Sequence[PlannedRun]) -> Task:
        ordered = sorted(runs, key=lambda run: run.status.point.run.iterations)
        one, point = runs[0], runs[0].status.point
        # The plan counts one start a Series; on warm ranks there is none.
        start = one.size.duration.start.expected
        return Task(
            series_id=series_id,
            run_dirs=tuple(self.root.run(run.status.run_id).absolute() for run in ordered),
            nodes=one.size.nodes,
            ranks=one.layout.ranks,
            threads=one.layout.threads,
            gpu_fraction=one.size.resources.gpu_fraction if one.layout.ranks == 1 else 1.0,
            seconds=max(0.0, 3600 * sum(run.hours.expected for run in runs) - start),
            architecture=point.architecture,
            hours=sum((run.hours for run in runs), NOTHING),
            label=f"{point.size} ({point.architecture})",
        )


def keep_plan(root: Root, plan: Plan) -> None:
    """Keep what was planned when it was submitted, beside the study."""
    path = root.study(plan.study.name) / "plan.json"
    write_atomically(path, json.dumps(plan.as_json(), indent=1, allow_nan=False) + "\n")


def keep_calibration(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
    """Keep how long the steps of finished Runs took, for this study's next plan and for those of others."""
    study, text = resolved.study, resolved.points[0].run.model.text
    positions = read_text_positions(study, text, resolved.corpus)
    write_calibration(resolved.root, study.name, rows, positions)


def names_of(tasks: Sequence[Task]) -> list[str]:
    """Return the Runs of tasks."""
    return [folder.name for task in tasks for folder in task.run_dirs]


def number_of(handle: Handle) -> str:
    """Return the scheduler's number of the batch a task was submitted in."""
    return handle.job_id.partition("_")[0]


def said_of(target: SubmitTarget) -> dict[str, str | int | None]:
    """Return what control.jsonl keeps of the user's options, for `retry`."""
    if target.ray_address is not None:
        return {"ray_address": target.ray_address}
    if target.cluster is None:
        return {}
    return {"cluster": lasting_name(target.cluster), "nodes": target.nodes}
