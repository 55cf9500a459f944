"""What any Series of a study would take here: resources, memory and hours, whether it is part of the grid or not.

Costs are those of a size under an architecture, worked out once: a plan of ten thousand Runs has a hundred of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.calibration import timed_steps
from harness.cluster import Cluster, nodes_for
from harness.cost import Cost, Duration, duration, mean_text_positions, run_cost
from harness.grid import CorpusView, GridPoint
from harness.memory import Range
from harness.out_of_memory import Refused
from harness.resources import Hours, Resources, choose_resources
from harness.run import Run
from harness.rundir import Layout, Root
from harness.speed import Speeds
from harness.status import RunStatus
from harness.study import ResourceChoice, Study
from harness.training.schedule import branch_step
from ssmttm.config import TextConfig
from ssmttm.errors import InputError

HELD_OUT_SHARE = 0.1
"""Held-out clips over clips trained on, where a study evaluates all and the corpus is elsewhere."""


@dataclass(frozen=True)
class SizeEstimate:
    """What all Series of one size under one architecture have in common."""

    resources: Resources
    duration: Duration
    nodes: int
    cost: Cost
    """Of one step."""
    peak_flops: float | None

    @property
    def layout(self) -> Layout:
        """Ranks, micro-batch and ZeRO stage."""
        return self.resources.layout


@dataclass
class Estimator:
    """Estimates for one study on one cluster, from what is known when it is made."""

    study: Study
    cluster: Cluster
    speeds: Speeds
    refused: Refused
    text_positions: int
    eval_clips: int
    _sizes: dict[tuple[str, str], SizeEstimate] = field(default_factory=dict)

    def of_size(self, architecture: str, size: str, runs: Sequence[Run]) -> SizeEstimate:
        """The estimate for a size whose Series hold these Runs; raises InputError where resources do not fit."""
        key = (architecture, size)
        if key not in self._sizes:
            self._sizes[key] = self._estimate(architecture, size, runs)
        return self._sizes[key]

    def gpu_hours(self, architecture: str, run: Run, size: str | None = None) -> Range:
        """GPU-hours of any Run with its own trunk from the start, be it of the grid or not."""
        known = size if size is not None and size in self.study.grid.sizes else None
        estimate = self._estimate(architecture, known, [run])
        return self.hours(estimate.duration, run.iterations, starts=1) * estimate.layout.ranks

    def hours(self, taken: Duration, steps: int, *, starts: int, runs: int = 1) -> Range:
        """Hours of so many steps that end in so many Runs, with the checkpoints and evaluations on the way."""
        every = self.study.tracking.eval_every
        return taken.hours(
            steps,
            evaluations=runs + (steps // every if every else 0),
            checkpoints=runs + steps // self.study.resources.checkpoint_every,
            starts=starts,
        )

    def _estimate(self, architecture: str, size: str | None, runs: Sequence[Run]) -> SizeEstimate:
        longest = max(runs, key=lambda run: run.iterations)
        steps = series_steps(runs)

        def hours(layout: Layout) -> Range:
            return self.hours(self._duration(architecture, longest, layout), steps, starts=1, runs=len(runs))

        choice = self.study.resources if size is None else self.study.resources_of(architecture, size)
        resources = self._resources(architecture, size, longest, choice, hours)
        layout = resources.layout
        one = longest.model_copy(update={"iterations": 1})
        return SizeEstimate(
            resources=resources,
            duration=self._duration(architecture, longest, layout),
            nodes=nodes_for(layout, self.cluster),
            cost=run_cost(one, self.text_positions),
            peak_flops=self.study.resources.peak_flops or self.cluster.peak_flops.get(longest.precision),
        )

    def _resources(
        self, architecture: str, size: str | None, run: Run, choice: ResourceChoice, hours: Hours
    ) -> Resources:
        try:
            return choose_resources(run, choice, self.cluster, refused=self.refused, hours=hours)
        except InputError as error:
            if size is None or choice is self.study.resources:
                raise
            raise InputError(f"grid.sizes.{size} ({architecture}): {error}") from error

    def _duration(self, architecture: str, run: Run, layout: Layout) -> Duration:
        peak = self.study.resources.peak_flops
        return duration(
            architecture,
            run,
            layout,
            self.cluster.device(run.precision, layout.threads, peak),
            self.speeds,
            text_positions=self.text_positions,
            eval_clips=self.eval_clips,
            warm=self.cluster.name == "local",
        )


def series_steps(runs: Sequence[Run]) -> int:
    """Steps of a Series that shares its trunk: to the last branch point, and every decay."""
    branches = [branch_step(run.schedule, run.iterations) for run in runs]
    decays = sum(run.iterations - branch for run, branch in zip(runs, branches, strict=True))
    return max(branches) + decays


def make_estimator(
    study: Study,
    points: Sequence[GridPoint],
    corpus: CorpusView,
    root: Root,
    cluster: Cluster,
    rows: Sequence[RunStatus] = (),
) -> Estimator:
    """Everything known under ROOT that bears on what a study costs; `rows` are its Runs as they stand."""
    text_positions = read_text_positions(study, points[0].run.model.text, corpus)
    folder = root.study(study.name)
    return Estimator(
        study=study,
        cluster=cluster,
        speeds=Speeds(timed_steps(root, study.name, rows, text_positions)),
        refused=Refused(folder),
        text_positions=text_positions,
        eval_clips=study.training.eval_clips or max(1, round(HELD_OUT_SHARE * corpus.clips)),
    )


def read_text_positions(study: Study, text: TextConfig, corpus: CorpusView) -> int:
    """Text positions of the study's average caption; the most there may be where its corpus is elsewhere."""
    if not corpus.is_known or not study.corpus.path.exists():
        return text.max_positions
    from ssmttm.dataset import TokenDataset  # and with it NumPy, which `status` does without

    train = TokenDataset(study.corpus.path, "train")
    return mean_text_positions(text, train.captions(range(min(len(train), 512))))
