"""What is left to do of a study, and what it will cost: nothing is written and nothing heavy is imported.

A Run costs what it adds: the piece of trunk from the last branch point before its own, and its decay. That is what
sharing trunks saves against training every Run from the start.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.cluster import Cluster, choose_resources, nodes_for
from harness.cost import (
    GIB,
    Calibration,
    Cost,
    assumed_speed,
    checkpoint_bytes,
    mean_text_positions,
    memory_gib,
    run_cost,
    weights_bytes,
)
from harness.dispatch.slurm_queue import JobView
from harness.grid import CorpusView, GridPoint
from harness.rundir import Layout, Root, read_model
from harness.status import OVER, RunState, RunStatus, StatusReader
from harness.study import Study
from harness.training.schedule import branch_step
from ssmttm.errors import InputError


@dataclass(frozen=True)
class PlannedRun:
    """One row of the plan."""

    status: RunStatus
    cost: Cost
    layout: Layout
    nodes: int
    gpus: int
    """Devices: GPUs, or CPU ranks where there is no GPU."""
    memory_gib: float
    """GiB a device."""
    disk_gib: float
    """GiB it leaves under ROOT: its branch point, unless a shorter Run leaves the trunk there too, and its weights."""
    checkpoint_gib: float
    """GiB of one checkpoint of its Series."""
    wall_hours: float
    """Hours this Run adds to its Series, from the last branch point before its own."""
    wall_hours_alone: float
    """Hours it would take from the start, sharing nothing."""
    peak_flops: float | None = None
    """Peak FLOP/s of a rank's device, where known."""

    @property
    def gpu_hours(self) -> float:
        """Device-hours this Run adds."""
        return self.wall_hours * self.gpus


@dataclass(frozen=True)
class PlannedSize:
    """What a size is under one architecture, beside what was asked for and what was published."""

    size: str
    architecture: str
    n_blocks: int
    d_model: int
    n_params: int
    target_n_params: float | None
    reference_n_params: float | None

    def as_json(self) -> dict[str, Any]:
        """A row of `sizes` in `ssmscale plan --json`; deviations are shares of the target and of the reference."""
        off = {"deviation": self.target_n_params, "reference_deviation": self.reference_n_params}
        return asdict(self) | {key: count and self.n_params / count - 1 for key, count in off.items()}


@dataclass(frozen=True)
class Plan:
    """Every Run of a study with its state, cost and resources."""

    study: Study
    identified: bool
    """Whether the corpus is known, so that Runs have ids."""
    runs: tuple[PlannedRun, ...]
    disk_passing_gib: float
    """GiB that periodic and decay checkpoints take besides, about, while Series are trained side by side."""
    notes: tuple[tuple[str, str], ...]
    """Coded notes: (code, text)."""

    @property
    def missing(self) -> list[PlannedRun]:
        """Runs a submission would train."""
        return [run for run in self.runs if run.status.state in {RunState.NEW, RunState.INTERRUPTED}]

    def as_json(self) -> dict[str, Any]:
        """The document of `ssmscale plan --json`."""
        return {
            "study": self.study.name,
            "sizes": [size.as_json() for size in self.sizes()],
            "runs": [self._row(run) for run in self.runs],
            "totals": self.totals(),
            "design": {"notes": [{"code": code, "text": text} for code, text in self.notes]},
        }

    def sizes(self) -> list[PlannedSize]:
        """Each size under each architecture, size by size."""
        models = {(run.status.point.size, run.status.point.architecture): run for run in self.runs}
        names = list(self.study.grid.sizes)
        found = []
        for (size, architecture), run in sorted(models.items(), key=lambda entry: names.index(entry[0][0])):
            model, asked = run.status.point.run.model, self.study.size_keys_of(architecture, size)
            shape = (model.n_blocks, model.d_model, run.cost.n_params)
            found.append(PlannedSize(size, architecture, *shape, asked.n_params, asked.reference_n_params))
        return found

    def totals(self) -> dict[str, Any]:
        """Sums over the Runs: what a submission spends, what it would without trunks, what finished Runs save."""
        left = [run for run in self.runs if run.status.state not in OVER]
        kept = sum(run.disk_gib for run in self.runs)
        return {
            "runs": len(self.runs),
            "series": len({run.status.series_id for run in self.runs}),
            "gpu_hours": sum(run.gpu_hours for run in left),
            "gpu_hours_independent": sum(run.wall_hours_alone * run.gpus for run in left),
            "gpu_hours_reused": sum(run.gpu_hours for run in self.runs if run.status.state is RunState.DONE),
            "disk_gib": kept,
            "disk_peak_gib": kept + self.disk_passing_gib,
        }

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
            "nodes": run.nodes,
            "gpus": run.gpus,
            "zero_stage": run.layout.zero_stage,
            "micro_batch": run.layout.micro_batch,
            "accumulation": run.layout.accumulation,
            "memory_gib": round(run.memory_gib, 4),
            "disk_gib": run.disk_gib,
            "wall_hours": run.wall_hours,
            "gpu_hours": run.gpu_hours,
        }


def make_plan(
    study: Study,
    points: Sequence[GridPoint],
    corpus: CorpusView,
    root: Root,
    cluster: Cluster,
    jobs: Mapping[str, JobView] | None = None,
) -> Plan:
    """Cost every Run of the grid and find its state, `jobs` being a scheduler's word by run id.

    Raises InputError where resources do not fit.
    """
    rows = StatusReader(root, study.name).read(points, jobs=jobs)
    calibration = read_calibration(root, study.name)
    text_positions = _text_positions(study, points, corpus)
    behind: dict[str, int] = {}
    branch_points: set[tuple[str, int]] = set()
    planned: dict[int, PlannedRun] = {}
    for index in sorted(range(len(rows)), key=lambda i: rows[i].point.run.iterations):
        status = rows[index]
        run = status.point.run
        layout = _layout(study, status.point, cluster)
        cost = run_cost(run, text_positions)
        speed = calibration.speed(status.point.architecture, status.point.size)
        peak = study.resources.peak_flops or cluster.peak_flops.get(run.precision)
        speed = (speed or assumed_speed(layout.threads, peak)) * layout.ranks
        branch = branch_step(run.schedule, run.iterations)
        trunk = branch - behind.get(status.series_id, 0)
        if status.state not in {RunState.FAILED, RunState.CANCELLED}:
            behind[status.series_id] = branch
        steps = trunk + run.iterations - branch
        checkpoint_gib = checkpoint_bytes(run.model, layout.zero_stage) / GIB
        adds_branch_point = branch > 0 and (status.series_id, branch) not in branch_points
        branch_points.add((status.series_id, branch))
        planned[index] = PlannedRun(
            status=status,
            cost=cost,
            layout=layout,
            nodes=nodes_for(layout, cluster),
            gpus=layout.ranks,
            peak_flops=peak,
            memory_gib=memory_gib(
                run.model,
                frames=run.frames,
                micro_batch=layout.micro_batch,
                ranks=layout.ranks,
                zero_stage=layout.zero_stage,
                checkpointed=layout.activation_checkpointing,
            ),
            disk_gib=adds_branch_point * checkpoint_gib + weights_bytes(run.model) / GIB,
            checkpoint_gib=checkpoint_gib,
            wall_hours=cost.flops * steps / run.iterations / speed / 3600,
            wall_hours_alone=cost.flops / speed / 3600,
        )
    runs = tuple(planned[i] for i in range(len(rows)))
    passing = _passing_gib(study, runs, cluster)
    notes = [*_notes(study, corpus, cluster, calibration), *_disk_notes(root, runs, passing)]
    return Plan(study, corpus.is_known, runs, passing, tuple(notes))


def _layout(study: Study, point: GridPoint, cluster: Cluster) -> Layout:
    choice = study.resources_of(point.architecture, point.size)
    try:
        return choose_resources(point.run, choice, cluster)
    except InputError as error:
        if choice is study.resources:
            raise
        raise InputError(f"grid.sizes.{point.size} ({point.architecture}): {error}") from error


def _passing_gib(study: Study, runs: Sequence[PlannedRun], cluster: Cluster) -> float:
    """GiB of what comes and goes in training: `keep_last` periodic checkpoints and one of a decay for each Series."""
    series: dict[str, PlannedRun] = {
        run.status.series_id: run for run in runs if run.status.state not in OVER
    }
    choice, capacity = study.resources, cluster.gpus or cluster.cores
    each = choice.keep_last + choice.keep_best + 1
    needs = (r.layout.ranks * (1 if cluster.gpus else r.layout.threads) for r in series.values())
    need = min(capacity, min(needs, default=1))
    at_once = min(choice.jobs or capacity, max(1, capacity // need))
    largest = sorted((run.checkpoint_gib for run in series.values()), reverse=True)
    return each * sum(largest[:at_once])


def _disk_notes(root: Root, runs: Sequence[PlannedRun], passing: float) -> list[tuple[str, str]]:
    needed = passing + sum(run.disk_gib for run in runs if run.status.state not in OVER)
    place = root.path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    if free >= needed:
        return []
    text = (
        f"{root.path} has {free:.4g} GiB free, and training what is left takes about {needed:.4g} GiB, "
        f"{passing:.4g} GiB of them in passing; `ssmscale prune` frees what finished studies no longer need"
    )
    return [("disk_short", text)]


def read_calibration(root: Root, study_name: str) -> Calibration:
    """calibration.json of a study; empty where nothing has finished."""
    path = root.study(study_name) / "calibration.json"
    return read_model(path, Calibration) if path.exists() else Calibration()


def _text_positions(study: Study, points: Sequence[GridPoint], corpus: CorpusView) -> int:
    text = points[0].run.model.text
    if not corpus.is_known or not study.corpus.path.exists():
        return text.max_positions
    from ssmttm.dataset import TokenDataset  # and with it NumPy, which `status` does without

    train = TokenDataset(study.corpus.path, "train")
    return mean_text_positions(text, train.captions(range(min(len(train), 512))))


def _notes(
    study: Study, corpus: CorpusView, cluster: Cluster, calibration: Calibration
) -> list[tuple[str, str]]:
    notes = []
    if not corpus.is_known:
        notes.append(
            (
                "corpus_unknown",
                f"{study.corpus.path} is not here: costs follow corpus.facts, runs have no ids and cannot be submitted"
                + ("" if study.text.encoder == "bytes" else f"; {study.text.encoder} was not looked for"),
            )
        )
    elif not study.corpus.path.exists():
        notes.append(
            (
                "corpus_elsewhere",
                f"{study.corpus.path} is not here: captions count as long as they may be; `submit` needs the corpus",
            )
        )
    if not cluster.gpus:
        notes.append(
            ("cpu_ranks", "no GPU here: a device is a CPU rank and GPU-hours are hours of such ranks")
        )
    if not calibration.flops_per_second:
        notes.append(
            ("speed_assumed", "nothing of this study has finished yet: hours follow an assumed speed")
        )
    return notes
