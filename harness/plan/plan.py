"""The plan of a study: the Runs left to train, their costs, and coded notes on the basis of the figures.

Planning writes nothing and imports nothing heavy. The cost of a Run is what it adds to its Series: the piece of trunk
from the branch point before its own, and its decay. Runs that share no trunk would each be trained from the start.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.common.disk import DiskFull, free_bytes
from harness.common.format import GIB, Estimate, counted
from harness.plan.cluster import Cluster
from harness.plan.estimate import Cost, Estimator, SizeEstimate, checkpoint_bytes, weights_bytes
from harness.plan.speed import GPU_FLOPS
from harness.record.jobs import JobView
from harness.record.root import Launch, Layout, Root, read_model_if_there
from harness.record.status import OVER, RunState, RunStatus, StatusReader
from harness.study.grid import UNKNOWN_FINGERPRINT, CorpusView, GridPoint
from harness.study.run import Precision, branch_step, by_series
from harness.study.schema import Study
from ssmttm.errors import InputError

Note = tuple[str, str]
"""Code and text of a note on the figures."""


OTHER_EVALUATIONS = "eval_every_differs"
"""Code of the note that finished Runs have other evaluations on the way than the study asks for."""


@dataclass(frozen=True)
class PlannedRun:
    """One row of the plan."""

    status: RunStatus
    cost: Cost
    size: SizeEstimate
    """Estimates for all Series of its size."""
    disk_gib: float
    """GiB it leaves under ROOT: its branch point, unless a shorter Run leaves the trunk there too, and its weights."""
    hours: Estimate
    """Hours this Run adds to its Series, from the last branch point before its own."""
    hours_alone: Estimate
    """Hours from the start, sharing no trunk."""
    hours_apart: Estimate
    """Hours to its end from the newest branch point of a finished Run, if its branch were a job of its own."""

    @property
    def series_id(self) -> str:
        """Id of its Series."""
        return self.status.series_id

    @property
    def layout(self) -> Layout:
        """Ranks, micro-batch and ZeRO stage it is trained with."""
        return self.size.resources.layout

    @property
    def gpus(self) -> int:
        """Number of devices: GPUs, or CPU ranks where there is no GPU."""
        return self.layout.ranks

    @property
    def gpu_hours(self) -> float:
        """Device-hours this Run is expected to add."""
        return self.hours.expected * self.gpus


@dataclass(frozen=True)
class Plan:
    """Every Run of a study with its state, cost and resources."""

    study: Study
    identified: bool
    """True if corpus and text encoder are known, so that Runs have ids."""
    runs: tuple[PlannedRun, ...]
    disk_passing_gib: float
    """GiB that periodic and decay checkpoints take for a while, about, while Series are trained side by side."""
    notes: tuple[Note, ...]

    @property
    def left(self) -> list[PlannedRun]:
        """Runs that are not over: those to train, and those that train or wait already."""
        return [run for run in self.runs if run.status.state not in OVER]

    @property
    def missing(self) -> list[PlannedRun]:
        """Runs that `submit` would train."""
        return [run for run in self.runs if run.status.state in {RunState.NEW, RunState.INTERRUPTED}]

    @property
    def shared(self) -> list[PlannedRun]:
        """Runs of a Series that trains for another study; `submit` has them join its work."""
        return [run for run in self.runs if run.status.is_others]

    def as_json(self) -> dict[str, Any]:
        """Return the document of `ssmscale plan --json`."""
        return {
            "study": self.study.name,
            "sizes": self.sizes(),
            "runs": [self._row(run) for run in self.runs],
            "totals": self.totals(),
            "design": {"notes": [{"code": code, "text": text} for code, text in self.notes]},
        }

    def sizes(self) -> list[dict[str, Any]]:
        """Return a row for each size under each architecture; deviations are shares of target and reference."""
        models = {(run.status.point.size, run.status.point.architecture): run for run in self.runs}
        names = list(self.study.grid.sizes)
        found = []
        for (size, architecture), run in sorted(models.items(), key=lambda entry: names.index(entry[0][0])):
            model, n_params = run.status.point.run.model, run.cost.n_params
            asked = self.study.size_keys_of(architecture, size)
            row: dict[str, Any] = {"size": size, "architecture": architecture}
            row |= {"n_blocks": model.n_blocks, "d_model": model.d_model, "n_params": n_params}
            row |= {"target_n_params": asked.n_params, "reference_n_params": asked.reference_n_params}
            row["deviation"] = asked.n_params and n_params / asked.n_params - 1
            row["reference_deviation"] = asked.reference_n_params and n_params / asked.reference_n_params - 1
            found.append(row)
        return found

    def totals(self) -> dict[str, Any]:
        """Sum up the hours left to train, with and without shared trunks, the hours reused, and the disk."""
        left = self.left
        kept = sum(run.disk_gib for run in self.runs)
        return {
            "runs": len(self.runs),
            "series": len({run.status.series_id for run in self.runs}),
            **_ends("gpu_hours", sum((run.hours * run.gpus for run in left), Estimate())),
            "gpu_hours_independent": sum(run.hours_alone.expected * run.gpus for run in left),
            "gpu_hours_reused": sum(run.gpu_hours for run in self.runs if run.status.state is RunState.DONE),
            **_ends("longest_path_hours", self.longest_path()),
            "branches_apart_hours": max((run.hours_apart.expected for run in left), default=0.0),
            "disk_gib": kept,
            "disk_peak_gib": kept + self.disk_passing_gib,
        }

    def longest_path(self) -> Estimate:
        """Return the hours of the longest Series, its branches one after the other: no number of GPUs ends sooner."""
        left = by_series(self.left)
        series = (sum((run.hours for run in runs), Estimate()) for runs in left.values())
        return max(series, key=lambda hours: hours.expected, default=Estimate())

    def _row(self, run: PlannedRun) -> dict[str, Any]:
        status, model = run.status, run.status.point.run
        shown = {RunState.INTERRUPTED: RunState.NEW, RunState.CANCELLED: RunState.FAILED}
        return {
            "run_id": status.run_id if self.identified else None,
            "series": status.series_id if self.identified else None,
            "architecture": status.point.architecture,
            "size": status.point.size,
            "n_params": run.cost.n_params,
            "n_params_non_embedding": run.cost.n_params_non_embedding,
            "iterations": model.iterations,
            "tokens": run.cost.tokens,
            "flops": run.cost.flops,
            "seed": model.seed,
            "state": shown.get(status.state, status.state),
            "nodes": run.size.nodes,
            "gpus": run.gpus,
            "zero_stage": run.layout.zero_stage,
            "micro_batch": run.layout.micro_batch,
            "accumulation": run.layout.accumulation,
            "activation_checkpointing": run.layout.activation_checkpointing,
            "gpu_fraction": run.size.resources.gpu_fraction,
            **_ends("memory_gib", run.size.resources.memory.gib, digits=4),
            "disk_gib": run.disk_gib,
            **_ends("wall_hours", run.hours),
            "gpu_hours": run.gpu_hours,
            "speed": run.size.duration.source,
            "why": run.size.resources.why,
        }


def _ends(key: str, value: Estimate, digits: int | None = None) -> dict[str, float]:
    """Return an estimate as three keys: expected, low and high."""
    ends = {key: value.expected, f"{key}_low": value.low, f"{key}_high": value.high}
    return ends if digits is None else {name: round(end, digits) for name, end in ends.items()}


def make_plan(
    study: Study,
    points: Sequence[GridPoint],
    corpus: CorpusView,
    root: Root,
    cluster: Cluster,
    jobs: Mapping[str, JobView] | None = None,
) -> Plan:
    """Find the state of every Run of the grid, and estimate its cost; `jobs` are a scheduler's jobs by run id.

    Raises InputError where resources do not fit.
    """
    rows = StatusReader(root, study.name).read(points, jobs=jobs)
    estimator = Estimator(study, points, corpus, root, cluster, rows)
    series = [_series(members, estimator) for members in by_series(rows).values()]
    planned = {run.status.run_id: run for runs in series for run in runs}
    runs = tuple(planned[row.run_id] for row in rows)
    passing = _passing_gib(study, runs, _at_once(study, runs, cluster))
    needed = passing + sum(run.disk_gib for run in runs if run.status.state not in OVER)
    text_is_known = points[0].run.text_encoder != UNKNOWN_FINGERPRINT
    notes = _on_corpus(study, corpus, text_is_known=text_is_known)
    notes += _on_speed(cluster, [run.size for run in runs])
    notes += _on_gpus(study, cluster, {run.status.point.run.precision for run in runs})
    notes += _on_disk(root, needed, passing)
    notes += _on_evaluations(study, runs, root)
    return Plan(study, corpus.is_known and text_is_known, runs, passing, tuple(notes))


def _series(members: Sequence[RunStatus], estimator: Estimator) -> list[PlannedRun]:
    """Plan the Runs of one Series; each adds the trunk from the last branch point before its own."""
    rows = sorted(members, key=lambda row: row.point.run.iterations)
    point = rows[0].point
    size = estimator.of_size(point.architecture, point.size, [row.point.run for row in rows])
    checkpoint_gib = checkpoint_bytes(point.run.model, size.resources.layout.zero_stage) / GIB
    weights_gib = weights_bytes(point.run.model) / GIB
    behind, trained, begun, branches, found = 0, 0, False, set[int](), []
    for status in rows:
        run = status.point.run
        branch = branch_step(run.schedule, run.iterations)
        starts = int(not begun and status.state not in OVER)
        begun = begun or bool(starts)
        found.append(
            PlannedRun(
                status=status,
                cost=size.cost(run.iterations),
                size=size,
                disk_gib=(branch > 0 and branch not in branches) * checkpoint_gib + weights_gib,
                hours=estimator.hours(size.duration, run.iterations - behind, starts=starts),
                hours_alone=estimator.hours(size.duration, run.iterations, starts=1),
                hours_apart=estimator.hours(
                    size.duration, run.iterations - trained, starts=1 + (branch > trained)
                ),
            )
        )
        branches.add(branch)
        if status.state not in {RunState.FAILED, RunState.CANCELLED}:
            behind = branch
        if status.state is RunState.DONE:
            trained = branch
    return found


def check_room(plan: Plan, root: Root, at_once: int | None = None) -> str | None:
    """Return a warning if ROOT has too little room for what the missing Runs keep there at once; None if it has enough.

    `at_once` is the number of Series that train side by side; None takes as many as fit on a node. Raises DiskFull if
    not even one checkpoint fits.
    """
    missing = plan.missing
    if not missing:
        return None
    a_size = {(run.status.point.architecture, run.status.point.size): run for run in missing}.values()
    smallest = min(checkpoint_bytes(run.status.point.run.model, run.layout.zero_stage) for run in a_size)
    if free_bytes(root.path.absolute()) < smallest:
        raise DiskFull(root.path, smallest)
    passing = plan.disk_passing_gib if at_once is None else _passing_gib(plan.study, missing, at_once)
    notes = _on_disk(root, passing + sum(run.disk_gib for run in missing), passing)
    return notes[0][1] if notes else None


def _at_once(study: Study, runs: Sequence[PlannedRun], cluster: Cluster) -> int:
    """Return the number of Series that one node trains at once."""
    left, capacity = [run for run in runs if run.status.state not in OVER], cluster.devices_a_node
    needs = (run.layout.ranks * (1 if cluster.gpus else run.layout.threads) for run in left)
    need = min(capacity, min(needs, default=1))
    return min(study.resources.jobs or capacity, max(1, capacity // need))


def _passing_gib(study: Study, runs: Sequence[PlannedRun], at_once: int) -> float:
    """Return the GiB of files that training later removes: `keep_last` periodic checkpoints and a decay's a Series."""
    series = {run.status.series_id: run for run in runs if run.status.state not in OVER}
    choice = study.resources
    each = choice.keep_last + choice.keep_best + 1
    sizes = [checkpoint_bytes(r.status.point.run.model, r.layout.zero_stage) for r in series.values()]
    return each * sum(sorted(sizes, reverse=True)[:at_once]) / GIB


def _on_corpus(study: Study, corpus: CorpusView, *, text_is_known: bool) -> list[Note]:
    path, encoder, facts = study.corpus.path, study.text.encoder, study.corpus.facts
    if not corpus.is_known:
        text = f"{path} is not here: costs follow corpus.facts, runs have no ids and cannot be submitted"
        if encoder != "bytes":
            text += f"; {encoder} was not looked for"
        return [("corpus_unknown", text)]
    if not path.exists():
        text = f"{path} is not here: captions count as long as they may be; `submit` needs the corpus"
        return [("corpus_elsewhere", text)]
    notes = []
    if not text_is_known:
        text = f"text encoder {encoder} is not here: runs have no ids and finished ones are not found"
        notes.append(("text_unknown", f"{text}; `submit` fetches it from the hub"))
    if facts is not None and facts.clips != corpus.clips:
        text = f"{path} has {corpus.clips:,} clips to train on; corpus.facts.clips is {facts.clips:,}"
        notes.append(("corpus_facts", text))
    return notes


def _on_speed(cluster: Cluster, sizes: Sequence[SizeEstimate]) -> list[Note]:
    notes, sources = [], {size.duration.source for size in sizes}
    if not cluster.gpus:
        notes.append(
            ("cpu_ranks", "no GPU here: a device is a CPU rank and GPU-hours are hours of such ranks")
        )
    elif any(size.resources.memory.measured is None for size in sizes):
        text = "memory is checked against engines on the CPU, which does not validate what CUDA kernels keep"
        notes.append(("memory_estimated", text))
    if "assumed" in sources:
        text = "no run on such a device has finished under this root: hours follow an assumed speed"
        notes.append(("speed_assumed", text))
    elif "borrowed" in sources:
        text = "some architectures have no finished run on such a device: their hours follow another's speed"
        notes.append(("speed_borrowed", text))
    return notes


def _on_gpus(study: Study, cluster: Cluster, precisions: Collection[Precision]) -> list[Note]:
    """Name what is not known of the GPUs, and the key that tells it."""
    notes, name = [], cluster.gpu_type or "the GPU"
    if cluster.gpus and cluster.gpu_memory_gib is None:
        text = f"the memory of {name} is not known, so micro-batches are too large: pip install nvidia-ml-py"
        notes.append(("gpu_memory_unknown", text))
    unknown = [one for one in sorted(precisions) if not (study.resources.peak_flops or cluster.peak(one))]
    if cluster.gpus and unknown:
        text = (
            f"the {' and '.join(unknown)} peak of {name} is not known: hours count with {GPU_FLOPS / 1e12:g} "
            "TFLOP/s and no MFU is logged; set resources.peak_flops in the study to the FLOP/s of its data sheet, dense"
        )
        notes.append(("gpu_peak_unknown", text))
    return notes


def _on_evaluations(study: Study, runs: Sequence[PlannedRun], root: Root) -> list[Note]:
    """Describe finished Runs that are reused though they were evaluated on the way as another study asked."""
    asked = study.tracking.eval_every
    if asked is None:
        return []
    done = Counter(run.status.series_id for run in runs if run.status.state is RunState.DONE)
    others: dict[str, int] = {}
    for series_id, count in done.items():
        launch = None
        with contextlib.suppress(InputError):  # a damaged file is reported where it is needed
            launch = read_model_if_there(root.series(series_id) / "launch.json", Launch)
        if launch is not None and launch.eval_every != asked:
            every = "null" if launch.eval_every is None else str(launch.eval_every)
            others[every] = others.get(every, 0) + count
    if not others:
        return []
    reused = counted(sum(others.values()), "finished run")
    text = (
        f"{reused} reused that were trained with tracking.eval_every: {' or '.join(others)}, not {asked}: they are "
        "not trained again, and have no other evaluations on the way"
    )
    return [(OTHER_EVALUATIONS, text)]


def _on_disk(root: Root, needed: float, passing: float) -> list[Note]:
    free = free_bytes(root.path.absolute()) / GIB
    if free >= needed:
        return []
    text = (
        f"{root.path} has {free:.4g} GiB free, and training what is left takes about {needed:.4g} GiB, "
        f"{passing:.4g} GiB of them in passing; pruning finished studies frees what they no longer need"
    )
    return [("disk_short", text)]
