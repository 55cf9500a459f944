"""Costs of any Series of a study here, by arithmetic alone: tokens, FLOPs, disk, resources and hours.

Tokens and FLOPs are exact for whole clips; disk is what checkpoints hold. Hours are steps at the speed that
harness.plan.speed predicts, evaluations, checkpoints and a start, as a range. A size under an architecture is worked
out once: a plan of ten thousand Runs has a hundred of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from harness.common.format import Estimate
from harness.plan.cluster import Cluster, nodes_for
from harness.plan.memory import trained_parameters
from harness.plan.resources import Refused, Resources, choose_resources
from harness.plan.speed import Speeds, step_work, timed_steps
from harness.record.root import Layout, Root
from harness.record.status import RunStatus
from harness.study.grid import CorpusView, GridPoint
from harness.study.run import Run, branch_step
from harness.study.schema import Study
from ssmttm.errors import InputError
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count, training_flops
from ssmttm.text.config import TextConfig

HELD_OUT_SHARE = 0.1
"""Held-out clips over clips trained on, where a study evaluates all and the corpus is elsewhere."""
BYTES_A_BYTE_TOKEN = 4.0
"""Bytes of caption a position of a frozen subword encoder covers, about."""
START_SECONDS = Estimate(10.0, 30.0, 120.0)
"""From a job's start to its first step on a cluster: imports, process group, engine."""
WARM_START_SECONDS = Estimate(0.2, 0.5, 10.0)
"""The same where workers stay warm between Series."""
CHECKPOINT_BYTES_A_SECOND = Estimate(0.1e9, 0.4e9, 2e9)
"""Speed of writing a checkpoint with its checksums: from a busy network disk to a local one."""
EVAL_SHARE = 1 / 3
"""Work of an evaluated sequence over that of one trained on: a forward pass alone."""


@dataclass(frozen=True)
class Duration:
    """Seconds of training a Series, by what they are spent on."""

    step: Estimate
    """An optimiser step."""
    evaluation: Estimate
    """The held-out loss, once."""
    checkpoint: Estimate
    """Writing one."""
    start: Estimate
    """A job's way to its first step."""
    source: str
    """Basis of the step: measured, calibrated, borrowed or assumed."""


@dataclass(frozen=True)
class Cost:
    """Estimates for one Run taken alone, its trunk included."""

    n_params: int
    n_params_non_embedding: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class SizeEstimate:
    """Estimates that all Series of one size under one architecture have in common."""

    resources: Resources
    duration: Duration
    nodes: int
    step_cost: Cost
    """Of one step."""
    peak_flops: float | None

    @property
    def layout(self) -> Layout:
        """Ranks, micro-batch and ZeRO stage."""
        return self.resources.layout

    def cost(self, iterations: int) -> Cost:
        """Cost of a Run of that many iterations."""
        step = self.step_cost
        return replace(step, tokens=iterations * step.tokens, flops=iterations * step.flops)


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
        """Return the estimate for a size whose Series hold these Runs; raises InputError where it does not fit."""
        key = (architecture, size)
        if key not in self._sizes:
            self._sizes[key] = self._estimate(architecture, size, runs)
        return self._sizes[key]

    def hours(self, taken: Duration, steps: int, *, starts: int, runs: int = 1) -> Estimate:
        """Hours of so many steps that end in so many Runs, with the checkpoints and evaluations on the way."""
        every = self.study.tracking.eval_every
        evaluations = runs + (steps // every if every else 0)
        checkpoints = runs + steps // self.study.resources.checkpoint_every
        seconds = taken.step * steps + taken.evaluation * evaluations + taken.checkpoint * checkpoints
        return (seconds + taken.start * starts) * (1 / 3600)

    def _estimate(self, architecture: str, size: str, runs: Sequence[Run]) -> SizeEstimate:
        longest = max(runs, key=lambda run: run.iterations)
        steps = series_steps(runs)

        def hours(layout: Layout) -> Estimate:
            return self.hours(self._duration(architecture, longest, layout), steps, starts=1, runs=len(runs))

        choice = self.study.resources_of(architecture, size)
        try:
            resources = choose_resources(longest, choice, self.cluster, refused=self.refused, hours=hours)
        except InputError as error:
            raise InputError(f"grid.sizes.{size} ({architecture}): {error}") from error
        return SizeEstimate(
            resources=resources,
            duration=self._duration(architecture, longest, resources.layout),
            nodes=nodes_for(resources.layout, self.cluster),
            step_cost=run_cost(longest.model_copy(update={"iterations": 1}), self.text_positions),
            peak_flops=self.study.resources.peak_flops or self.cluster.peak_flops.get(longest.precision),
        )

    def _duration(self, architecture: str, run: Run, layout: Layout) -> Duration:
        device = self.cluster.device(run.precision, layout.threads, self.study.resources.peak_flops)
        work = step_work(run, layout, self.text_positions, on_cuda=device.kind == "cuda")
        step, source = self.speeds.seconds(architecture, run, work, device)
        size, rate = checkpoint_bytes(run.model, layout.zero_stage), CHECKPOINT_BYTES_A_SECOND
        return Duration(
            step=step,
            evaluation=step * (EVAL_SHARE * self.eval_clips / run.batch),
            checkpoint=Estimate(size / rate.high, size / rate.expected, size / rate.low),
            start=WARM_START_SECONDS if self.cluster.name == "local" else START_SECONDS,
            source=source,
        )


def make_estimator(
    study: Study,
    points: Sequence[GridPoint],
    corpus: CorpusView,
    root: Root,
    cluster: Cluster,
    rows: Sequence[RunStatus] = (),
) -> Estimator:
    """Gather everything known under ROOT that bears on a study's costs; `rows` are its Runs as they stand."""
    text_positions = read_text_positions(study, points[0].run.model.text, corpus)
    return Estimator(
        study=study,
        cluster=cluster,
        speeds=Speeds(timed_steps(root, study.name, rows, text_positions)),
        refused=Refused(root.study(study.name)),
        text_positions=text_positions,
        eval_clips=study.training.eval_clips or max(1, round(HELD_OUT_SHARE * corpus.clips)),
    )


def read_text_positions(study: Study, text: TextConfig, corpus: CorpusView) -> int:
    """Text positions of the study's average caption; the most there may be where its corpus is elsewhere."""
    if not corpus.is_known or not study.corpus.path.exists():
        return text.max_positions
    from ssmttm.corpus.dataset import TokenDataset  # and with it NumPy, which `status` does without

    train = TokenDataset(study.corpus.path, "train")
    return mean_text_positions(text, train.captions(range(min(len(train), 512))))


def mean_text_positions(text: TextConfig, captions: Sequence[str]) -> int:
    """Text positions of an average caption, at least one; the limit where there are no captions."""
    if not captions:
        return text.max_positions
    width = text.patch if text.encoder == "bytes" else BYTES_A_BYTE_TOKEN
    mean = sum(-(-(len(caption.encode()) + 1) // width) for caption in captions) / len(captions)
    return max(1, min(text.max_positions, round(mean)))


def series_steps(runs: Sequence[Run]) -> int:
    """Steps of a Series that shares its trunk: to the last branch point, and every decay."""
    branches = [branch_step(run.schedule, run.iterations) for run in runs]
    decays = sum(run.iterations - branch for run, branch in zip(runs, branches, strict=True))
    return max(branches) + decays


def run_cost(run: Run, text_positions: int) -> Cost:
    """Parameters, tokens and FLOPs of a Run."""
    count = parameter_count(run.model)
    flops_per_step = training_flops(run.model, run.frames, text_positions) * run.batch * run.frames
    return Cost(
        n_params=count.n_params,
        n_params_non_embedding=count.non_embedding,
        tokens=run.iterations * run.tokens_a_step,
        flops=run.iterations * flops_per_step,
    )


def checkpoint_bytes(model: ModelConfig, zero_stage: int) -> int:
    """Bytes of a checkpoint, whatever the ranks: fp32 weights and AdamW's two moments.

    Under ZeRO 1 and 2 the optimiser's shards hold the weights once more; measured to within 0.4 %.
    """
    return (16 if zero_stage in {1, 2} else 12) * trained_parameters(model)


def weights_bytes(model: ModelConfig) -> int:
    """Bytes of a finished Run's model.safetensors."""
    return 4 * trained_parameters(model)
