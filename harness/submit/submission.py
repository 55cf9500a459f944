"""Submit a plan to a backend: prepare the Runs, lease their Series, submit them, then supervise them or return.

Submitting is idempotent: finished Runs are reused, Runs whose Series another study trains join its work, and the others
are trained, longest Series first. Two submissions at once, or one repeated after it was killed half-way, submit
every Series once: a Series is leased before its batch is submitted to a backend that outlives this process, and the
lease is over only when its job has ended or is known never to have existed. All checks come before the first file is
written.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from harness.common.disk import DISK_THREADS, side_by_side, write_atomically
from harness.common.format import Estimate
from harness.common.process import identify_process
from harness.dispatch.arrays import ArrayStore, new_name
from harness.dispatch.base import Backend, Handle, SubmitTarget, Task
from harness.dispatch.supervise import JobSupervisor
from harness.plan.allocation import share_out
from harness.plan.cluster import lasting_name
from harness.plan.estimate import read_text_positions
from harness.plan.plan import Plan, PlannedRun
from harness.plan.speed import write_calibration
from harness.record.jobs import SchedulerUnavailable
from harness.record.provenance import record_code
from harness.record.registry import ResolvedStudy
from harness.record.root import Launch, Root, read_launch, write_launch, write_run, write_series
from harness.record.status import RunState, RunStatus, StatusReader
from harness.submit.leases import Leases, Trainer
from harness.tracking.store import sidecar_uri


def hand_over(resolved: ResolvedStudy, plan: Plan, backends: Sequence[Backend]) -> list[HandedOver]:
    """Submit the missing Runs to backends that outlive this process; returns the Series of each backend."""
    wanted = [*plan.missing, *plan.shared]
    shares = {backends[0]: wanted}
    if len(backends) > 1:  # the others pack Series that need less than a node
        target = backends[0].target
        assert target.profile is not None
        packed, apart = share_out(wanted, target.profile, target.on)
        shares = {backend: packed if backend.is_packed else apart for backend in backends}
    done = []
    for backend, runs in shares.items():
        if runs:
            with backend:
                done.append(Submission(resolved, plan, backend).hand_over([run.status for run in runs]))
    return done


@dataclass(frozen=True)
class HandedOver:
    """The Series that were submitted to a backend, and the number of those that were not."""

    backend: Backend
    handles: tuple[Handle, ...] = ()
    joined: tuple[Trainer, ...] = ()
    """The trainer of each Series whose work Runs have joined."""
    taken: int = 0
    """Number of Series whose job is ending, and which no Run could join."""
    waiting: int = 0
    """Number of Series that the backend does not admit now."""

    @property
    def runs(self) -> list[str]:
        """Ids of the submitted Runs."""
        return names_of([handle.task for handle in self.handles])

    @property
    def jobs(self) -> list[str]:
        """Job number of each batch."""
        return list(dict.fromkeys(number_of(handle) for handle in self.handles))


class Submission:
    """The submission of a study to one backend."""

    def __init__(
        self, resolved: ResolvedStudy, plan: Plan, backend: Backend, *, sidecars: bool = True
    ) -> None:
        """Prepare a submission; with `sidecars`, tasks that outlive this process mirror their Series themselves."""
        self.resolved, self.plan, self.backend = resolved, plan, backend
        self.sidecars = sidecars and backend.outlives
        self.root = resolved.root
        self.control = self.root.control(resolved.study.name)
        self.process = identify_process()
        self.left: dict[str, str] = {}
        """Study of each Series that this submission left to a scheduler's job."""
        self._ours: set[str] = set()
        """Series that no job had leased when the leases were last read."""
        self._submitted: list[str] = []
        """Ids of the Runs last recorded as submitted."""
        self._joined: set[str] = set()
        """Ids of the Runs recorded as joined."""

    @cached_property
    def code(self) -> str:
        """State of the submitted code, recorded in the study's directory."""
        return record_code(self.root.study(self.resolved.study.name))

    def hand_over(self, missing: Sequence[RunStatus]) -> HandedOver:
        """Submit the Series of these Runs, and have Runs join the work on those that are leased or trained.

        Raises SchedulerUnavailable.
        """
        leases, tasks = Leases(self.root), self.prepare(missing)
        joined: list[Trainer] = []
        if self.backend.outlives:
            tasks = self._join(leases, tasks, joined)
        admitted = self.backend.count_admitted(len(tasks)) if tasks else 0
        handles: list[Handle] = []
        taken = late = 0
        for members in self.backend.batches(tasks):
            name, wanted = new_name(), members[: admitted - len(handles)]
            ours = self._lease(leases, name, wanted)
            held = {task.series_id for task in wanted} - {task.series_id for task in ours}
            # Another submission may have leased them just now.
            rest = self._join(leases, [task for task in wanted if task.series_id in held], joined)
            taken += len(rest)
            late += len(held) - len(rest)
            if ours:
                self.launch(ours)
                batch = self.backend.submit(ours, name)
                self._record(batch)
                handles += batch
        self._record_joined(joined)
        waiting = len(tasks) - len(handles) - taken - late
        return HandedOver(self.backend, tuple(handles), tuple(joined), taken, waiting)

    def supervise(self, on_progress: Callable[[Sequence[RunStatus]], None]) -> list[RunStatus]:
        """Train the missing Runs, wait for those that other processes train here, and return the state of every Run.

        Series that a scheduler's job has leased are left to it; if that job is over when all others are trained, they
        are trained here. Raises DiskFull if a worker found the disk full.
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
            if stopped := supervisor.stopped_with_joined():
                ours = {handle.task.series_id for handle in handles}
                again = [task for task in stopped if task.series_id not in ours]
                handles = (*handles, *self.backend.submit(again))
            if is_last and not handles:
                keep_calibration(self.resolved, rows)
                return rows
            supervisor.watch_over(handles)
            supervisor.watch()

    def prepare(self, missing: Sequence[RunStatus]) -> list[Task]:
        """Write the files of these Runs, which all studies share; returns their Series as tasks, longest first."""
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
        """Write the launch settings of these Series, which must be leased: they are this study's."""
        planned = {run.status.run_id: run for run in self.plan.runs}

        def write(task: Task) -> None:
            write_launch(self.root, task.series_id, self._launch(planned[task.run_dirs[0].name]))

        side_by_side(write, tasks, DISK_THREADS)

    def leave_leased(self, tasks: Sequence[Task], leases: Leases) -> list[Task]:
        """Return the tasks whose Series no scheduler's job has leased; record the others in `left`.

        Raises SchedulerUnavailable if a scheduler of this machine does not answer, unless it has answered for all
        these Series before: then its last answer is used, and training here continues.
        """
        series_ids = {task.series_id for task in tasks}
        try:
            held = leases.held(sorted(series_ids))
        except SchedulerUnavailable as silence:
            if silence.is_here and not series_ids <= self._ours | self.left.keys():
                raise
            # A machine that is not a login node has no scheduler to ask, and relies on the journals.
            held = {key: study for key, study in self.left.items() if key in series_ids}
        self.left = {key: study for key, study in self.left.items() if key not in series_ids} | held
        self._ours |= series_ids - held.keys()
        return [task for task in tasks if task.series_id not in held]

    def _join(self, leases: Leases, tasks: Sequence[Task], joined: list[Trainer]) -> list[Task]:
        """Add the Runs of tasks to the work on their Series, list the trainers in `joined`, and return the rest."""
        name, leased_only = self.resolved.study.name, not self.backend.outlives

        def join(task: Task) -> Trainer | None:
            with contextlib.suppress(SchedulerUnavailable) if leased_only else contextlib.nullcontext():
                return leases.join(task.series_id, name, names_of([task]), leased_only=leased_only)
            return None

        trainers = side_by_side(join, tasks, DISK_THREADS)
        joined += [trainer for trainer in trainers if trainer is not None]
        return [task for task, trainer in zip(tasks, trainers, strict=True) if trainer is None]

    def _record_joined(self, joined: Sequence[Trainer]) -> None:
        """Record in control.jsonl the Runs that joined the work of others, each once."""
        for (study, array), trainers in by_array(joined).items():
            runs = [run_id for trainer in trainers for run_id in trainer.runs]
            if new := [run_id for run_id in runs if run_id not in self._joined]:
                with_whom = {"study": study, "array": array}
                options = {"on": self.backend.target.on, **options_of(self.backend.target)}
                self.control.append(
                    "submitted", runs=new, dispatcher=self.backend.name, joined=with_whom, **options
                )
                self._joined |= set(new)

    def _lease(self, leases: Leases, name: str, tasks: Sequence[Task]) -> list[Task]:
        """Return those of these tasks that this submission may submit.

        Tasks that this process supervises need no lease: their workers hold the locks of their Series.
        """
        if self.backend.outlives:
            return leases.take_all(self.resolved.study.name, name, tasks)
        return self.leave_leased(tasks, leases)

    def _record(self, handles: Sequence[Handle]) -> None:
        """Record in control.jsonl the submitted Runs, and the options by which the user chose the backend.

        A process that supervises its tasks records a repeated submission of the same Runs once.
        """
        runs, target = names_of([handle.task for handle in handles]), self.backend.target
        if self.backend.outlives:
            more = {"on": target.on, "job_id": number_of(handles[0]), "code": self.code, **options_of(target)}
            self.control.append("submitted", runs=runs, dispatcher=self.backend.name, **more)
        elif runs != self._submitted:
            self.control.append(
                "submitted", runs=runs, process=self.process, dispatcher=self.backend.name, code=self.code
            )
            self._submitted = runs

    def _launch(self, planned: PlannedRun) -> Launch:
        study, point = self.resolved.study, planned.status.point
        return Launch(
            corpus=study.corpus.path.absolute(),
            text_encoder=None if study.text.encoder == "bytes" else study.text.encoder,
            control=self.control.path.absolute(),
            dispatcher=self.backend.name,
            zero_stage=planned.layout.zero_stage,
            micro_batch=planned.layout.micro_batch,
            threads=planned.layout.threads,
            activation_checkpointing=planned.layout.activation_checkpointing,
            compile=study.resources_of(point.architecture, point.size).compile,
            log_every=study.tracking.log_every,
            checkpoint_every=study.resources.checkpoint_every,
            keep_last=study.resources.keep_last,
            keep_best=study.resources.keep_best,
            eval_every=study.tracking.eval_every,
            stall_seconds=study.resources.stall_seconds,
            peak_flops=planned.size.peak_flops,
            device="cuda" if planned.size.on_gpus else "cpu",
            wait_seconds=planned.size.duration.longest_wait,
            code=self.code,
            tracking=sidecar_uri(study, self.root) if self.sidecars else None,
        )

    def _task(self, series_id: str, runs: Sequence[PlannedRun]) -> Task:
        ordered = sorted(runs, key=lambda run: run.status.point.run.iterations)
        one, point = runs[0], runs[0].status.point
        # The plan includes one start of each Series; warm ranks have none.
        start = one.size.duration.start.expected
        return Task(
            series_id=series_id,
            run_dirs=tuple(self.root.run(run.status.run_id).absolute() for run in ordered),
            nodes=one.size.nodes,
            ranks=one.layout.ranks,
            threads=one.layout.threads,
            gpu_fraction=one.size.resources.gpu_fraction if one.layout.ranks == 1 else 1.0,
            host_gib=one.size.resources.host_gib,
            seconds=max(0.0, 3600 * sum(run.hours.expected for run in runs) - start),
            hours=sum((run.hours for run in runs), Estimate()),
            label=f"{point.size} ({point.architecture})",
        )


def keep_plan(root: Root, plan: Plan) -> None:
    """Write the submitted plan to plan.json in the study's directory."""
    path = root.study(plan.study.name) / "plan.json"
    write_atomically(path, json.dumps(plan.as_json(), indent=1, allow_nan=False) + "\n")


def keep_calibration(resolved: ResolvedStudy, rows: Sequence[RunStatus]) -> None:
    """Record the step times of finished Runs, for later plans of this study and of others."""
    study, text = resolved.study, resolved.points[0].run.model.text
    positions = read_text_positions(study, text, resolved.corpus)
    write_calibration(resolved.root, study.name, rows, positions)


def kept_by_jobs(resolved: ResolvedStudy, plan: Plan) -> tuple[int, list[str]]:
    """Return the number of Runs that wait or train with other resources than the study now gives, and which differ.

    Resources that the study leaves to the harness do not count.
    """
    folder = resolved.root.study(resolved.study.name)
    if not any(run.status.state in {RunState.QUEUED, RunState.RUNNING} for run in plan.runs):
        return 0, []
    tasks = {task.series_id: task for array in ArrayStore(folder).read().values() for task in array.tasks}
    differing: set[str] = set()
    runs = 0
    for run in plan.runs:
        status, task = run.status, tasks.get(run.series_id)
        if status.state not in {RunState.QUEUED, RunState.RUNNING} or task is None:
            continue
        launch = read_launch(resolved.root, run.series_id)
        if launch.control.parent != folder.absolute():
            continue
        choice = resolved.study.resources_of(status.point.architecture, status.point.size)
        now = choice.model_dump() | run.layout.model_dump()
        held = {"ranks": task.ranks, **launch.model_dump(include=set(type(choice).model_fields))}
        changed = [
            f"{key} {held[key]}, now {now[key]}"
            for key in type(choice).model_fields
            if key in held and getattr(choice, key) is not None and held[key] != now[key]
        ]
        differing |= set(changed)
        runs += bool(changed)
    return runs, sorted(differing)


def by_array(joined: Sequence[Trainer]) -> dict[tuple[str, str], list[Trainer]]:
    """Group trainers by study and array."""
    found: dict[tuple[str, str], list[Trainer]] = {}
    for trainer in joined:
        found.setdefault((trainer.study, trainer.array), []).append(trainer)
    return found


def names_of(tasks: Sequence[Task]) -> list[str]:
    """Return the ids of the Runs of tasks."""
    return [folder.name for task in tasks for folder in task.run_dirs]


def number_of(handle: Handle) -> str:
    """Return the job number of a task's batch."""
    return handle.job_id.partition("_")[0]


def options_of(target: SubmitTarget) -> dict[str, str | int | None]:
    """Return the user's options as control.jsonl records them for `retry`."""
    if target.ray_address is not None:
        return {"ray_address": target.ray_address}
    if target.cluster is None:
        return {}
    return {"cluster": lasting_name(target.cluster), "nodes": target.nodes}
