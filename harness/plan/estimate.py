"""Costs of any Series of a study, by arithmetic alone: tokens, FLOPs, disk, resources and hours.

Tokens and FLOPs are exact for whole clips; disk is the bytes of checkpoints. Hours are a range: steps at the speed that
harness.plan.speed predicts, evaluations, checkpoints and a start. A size under an architecture is estimated once, since
a plan of ten thousand Runs has a hundred of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from harness.common.format import Estimate
from harness.common.validation import first_mistake
from harness.plan.cluster import Cluster, nodes_for
from harness.plan.memory import trained_parameters
from harness.plan.resources import Refused, Resources, choose_resources
from harness.plan.speed import Speeds, step_work, timed_steps
from harness.record.root import Layout, Root
from harness.record.status import RunStatus
from harness.study.grid import CorpusView, GridPoint
from harness.study.run import Run, branch_step
from harness.study.schema import Study
from ssmttm.corpus.manifest import Clip, load_manifest
from ssmttm.errors import InputError
from ssmttm.files import read_lines
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count, training_flops
from ssmttm.text.config import TextConfig

HELD_OUT_SHARE = 0.1
"""Held-out clips over training clips, where a study evaluates all of them and the corpus is elsewhere."""
BYTES_A_SUBWORD = 4.0
"""Bytes of caption a position of a frozen subword encoder covers, about."""
CAPTIONS = 512
"""Captions of which the mean length is taken, the first in the corpus."""
START_SECONDS = Estimate(10.0, 30.0, 120.0)
"""From a job's start to its first step on a cluster: imports, process group, engine."""
WARM_START_SECONDS = Estimate(0.2, 0.5, 10.0)
"""The same where workers stay warm between Series."""
CHECKPOINT_BYTES_A_SECOND = Estimate(0.1e9, 0.4e9, 2e9)
"""Speed of writing a checkpoint with its checksums: from a busy network disk to a local one."""
CONVERSION_PASSES = 4
"""Passes of a checkpoint through the disk when it is converted for another number of ranks: it is read and taken apart,
and the parts are read and put together."""
EVAL_SHARE = 1 / 3
"""Work of an evaluated sequence over that of a training sequence: a forward pass alone."""


@dataclass(frozen=True)
class Duration:
    """Seconds of the parts of a Series' training."""

    step: Estimate
    """An optimiser step."""
    evaluation: Estimate
    """One evaluation of the held-out loss."""
    checkpoint: Estimate
    """Writing one checkpoint."""
    start: Estimate
    """From a job's start to its first step."""
    source: str
    """Basis of the step: measured, calibrated, borrowed or assumed."""

    @property
    def longest_wait(self) -> float:
        """Longest time in seconds, at the high end, in which ranks wait for another one without a collective.

        They evaluate, each for itself; or the first marks a checkpoint, or converts one for another number of ranks.
        """
        return max(self.evaluation.high, CONVERSION_PASSES * self.checkpoint.high)


@dataclass(frozen=True)
class Cost:
    """Exact counts of one Run trained alone, its trunk included."""

    n_params: int
    n_params_non_embedding: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class SizeEstimate:
    """Estimates shared by all Series of one size under one architecture."""

    resources: Resources
    duration: Duration
    nodes: int
    step_cost: Cost
    """Cost of one step."""
    peak_flops: float | None
    on_gpus: bool
    """True if each rank has a GPU."""

    def cost(self, iterations: int) -> Cost:
        """Return the cost of a Run of that many iterations."""
        step = self.step_cost
        return replace(step, tokens=iterations * step.tokens, flops=iterations * step.flops)


class Estimator:
    """Estimates for one study on one cluster, by the timed steps and failures under ROOT."""

    def __init__(
        self,
        study: Study,
        points: Sequence[GridPoint],
        corpus: CorpusView,
        root: Root,
        cluster: Cluster,
        rows: Sequence[RunStatus],
    ) -> None:
        self.study, self.cluster = study, cluster
        self.text_positions = read_text_positions(study, points[0].run.model.text, corpus)
        self.speeds = Speeds(timed_steps(root, study.name, rows, self.text_positions))
        self.refused = Refused(root.study(study.name))
        self.eval_clips = study.training.eval_clips or max(1, round(HELD_OUT_SHARE * corpus.clips))
        self._sizes: dict[tuple[str, str], SizeEstimate] = {}

    def of_size(self, architecture: str, size: str, runs: Sequence[Run]) -> SizeEstimate:
        """Return the estimate for a size whose Series hold these Runs; raises InputError where it does not fit."""
        key = (architecture, size)
        if key not in self._sizes:
            self._sizes[key] = self._estimate(architecture, size, runs)
        return self._sizes[key]

    def hours(self, taken: Duration, steps: int, *, starts: int, runs: int = 1) -> Estimate:
        """Return the hours of so many steps that end in so many Runs, checkpoints and evaluations included."""
        every = self.study.tracking.eval_every
        evaluations = runs + (steps // every if every else 0)
        checkpoints = runs + steps // self.study.resources.checkpoint_every
        seconds = taken.step * steps + taken.evaluation * evaluations + taken.checkpoint * checkpoints
        return (seconds + taken.start * starts) * (1 / 3600)

    def _estimate(self, architecture: str, size: str, runs: Sequence[Run]) -> SizeEstimate:
        longest = max(runs, key=lambda run: run.iterations)
        branches = [branch_step(run.schedule, run.iterations) for run in runs]
        # The trunk to the last branch point, and every decay.
        steps = max(branches) + sum(run.iterations for run in runs) - sum(branches)

        def hours(layout: Layout) -> Estimate:
            return self.hours(self._duration(architecture, longest, layout), steps, starts=1, runs=len(runs))

        choice = self.study.resources_of(architecture, size)
        kind = self.cluster.device(longest.precision, 1).kind
        measured = self.speeds.measured_memory(architecture, longest.precision, kind)
        try:
            resources = choose_resources(
                longest, choice, self.cluster, refused=self.refused, hours=hours, measured=measured
            )
        except InputError as error:
            raise InputError(f"grid.sizes.{size} ({architecture}): {error}") from error
        return SizeEstimate(
            resources=resources,
            duration=self._duration(architecture, longest, resources.layout),
            nodes=nodes_for(resources.layout, self.cluster),
            step_cost=run_cost(longest.model_copy(update={"iterations": 1}), self.text_positions),
            peak_flops=self.study.resources.peak_flops or self.cluster.peak(longest.precision),
            on_gpus=self.cluster.gpus > 0,
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


def read_text_positions(study: Study, text: TextConfig, corpus: CorpusView) -> int:
    """Return the text positions of the study's average caption; their limit where its corpus is elsewhere."""
    if not corpus.is_known or not study.corpus.path.exists():
        return text.max_positions
    return mean_text_positions(text, _first_captions(study.corpus.path))


def _first_captions(corpus: Path) -> list[str]:
    """Read the first training captions without NumPy, which takes longer to import than a plan to make."""
    facts = load_manifest(corpus).splits.get("train")
    if facts is None:
        raise InputError(f"{corpus}: has no split 'train'")
    path = corpus / facts.captions
    try:
        return [Clip.model_validate_json(line).caption for line in islice(read_lines(path), CAPTIONS)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), though the manifest lists it") from None
    except ValidationError as error:
        raise InputError(f"{path}: has a line that is not a clip: {first_mistake(error)}") from None


def mean_text_positions(text: TextConfig, captions: Sequence[str]) -> int:
    """Return the text positions of an average caption, at least one; the limit without captions."""
    if not captions:
        return text.max_positions
    width = text.patch if text.encoder == "bytes" else BYTES_A_SUBWORD
    mean = sum(-(-(len(caption.encode()) + 1) // width) for caption in captions) / len(captions)
    return max(1, min(text.max_positions, round(mean)))


def run_cost(run: Run, text_positions: int) -> Cost:
    """Count the parameters, tokens and FLOPs of a Run."""
    count = parameter_count(run.model)
    flops_per_step = training_flops(run.model, run.frames, text_positions) * run.batch * run.frames
    return Cost(
        n_params=count.n_params,
        n_params_non_embedding=count.non_embedding,
        tokens=run.iterations * run.tokens_a_step,
        flops=run.iterations * flops_per_step,
    )


def checkpoint_bytes(model: ModelConfig, zero_stage: int) -> int:
    """Return the bytes of a checkpoint on any number of ranks: fp32 weights and AdamW's two moments.

    Under ZeRO 1 and 2 the optimiser's shards hold the weights once more; measured to within 0.4 %.
    """
    return (16 if zero_stage in {1, 2} else 12) * trained_parameters(model)


def weights_bytes(model: ModelConfig) -> int:
    """Return the bytes of a finished Run's model.safetensors."""
    return 4 * trained_parameters(model)
