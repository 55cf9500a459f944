"""Seconds of an optimiser step: a cost for each pass through a sub-layer, for memory traffic, for arithmetic.

A small model's step is launches and memory traffic, a large one's is arithmetic; one speed in FLOP/s carries over to no
other size. So three terms are added up, and two factors correct them from steps that were timed: one for the machine,
which a single finished run shows, and one for the balance between launches and arithmetic, which needs runs of two
sizes. Both are held to 1 as far as nothing was measured (a maximum a posteriori estimate, log-normal priors).

Timed steps are read from the journals of finished Runs and kept in the study's calibration.json; those that other
studies under the same ROOT have kept count too. Of each size the longest finished Runs are read, and not again once
calibration.json has them, so that planning reads a few journals and not ten thousand. A Run that shared a GPU with
others tells nothing: its speed depended on what they did meanwhile, and a plan wants the speed it has alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_high
from typing import Annotated

from pydantic import Field

from harness.common.format import Estimate
from harness.plan.memory import activation_bytes
from harness.record.journal import Event, read_progress
from harness.record.root import Layout, Root, read_model, read_model_if_there, write_model
from harness.record.status import RunState, RunStatus
from harness.study.run import Count, Frozen, Positive, Precision, Run
from ssmttm.errors import InputError
from ssmttm.model.flops import training_flops

MFU = Estimate(0.15, 0.3, 0.5)
"""Share of a GPU's peak before anything was measured: from small models and unfused kernels to what large Transformers
reach (46 % for PaLM, arXiv 2204.02311, section 4; 52 % for Megatron, arXiv 2104.04473, table 1)."""
CPU_FLOPS_A_THREAD = 6e10
CPU_BYTES_A_SECOND = 4e9
CPU_PASS_SECONDS = 1.2e-3
"""A CPU thread, fitted to steps of the demo's models: products, saved activations that are written and read in the
backward pass with all that lies between, and a sub-layer's forward and backward calls."""
GPU_PASS_SECONDS = 4e-4
"""Launches of a sub-layer's forward, backward and update on a GPU: some 60 kernels of 6 to 8 microseconds."""
GPU_FLOPS = 50e12
"""Peak of a GPU whose profile gives none."""
CPU_SPREAD = (0.4, 2.5)
"""Low and high over expected before anything was measured on a CPU."""
KNOWN_SPREAD = (0.9, 1.12)
ALIKE_SPREAD = (0.75, 1.33)
OTHER_SPREAD = (0.55, 1.8)
"""The same once a run of this very shape, of this architecture, or of another architecture has been timed."""
MACHINE_PRIOR, BALANCE_PRIOR, NOISE = 1.0, 0.35, 0.1
"""Standard deviations of the logarithms: of a machine against the defaults, of launches against arithmetic, and of a
timed run."""


class StepTime(Frozen):
    """The steps of a finished Run, timed."""

    architecture: str
    size: str
    device: Annotated[str, Field(pattern=r"^(cpu|cuda)$")]
    device_name: str | None = None
    """As torch names a GPU."""
    precision: Precision = Precision.FP32
    ranks: Count = 1
    threads: Count = 1
    passes: Positive
    """Passes of a micro-batch through a sub-layer, a step and rank."""
    bytes: Positive
    """Activations saved, a step and rank."""
    flops: Positive
    """Operations a step and rank."""
    seconds: Positive
    """Median of a step."""
    runs: tuple[str, ...] = ()
    """Ids of the Runs that were read for it."""

    def is_of(self, other: StepTime) -> bool:
        """True if the same was timed on the same device."""
        same = ("architecture", "size", "device", "device_name", "precision", "ranks", "threads")
        return all(getattr(self, key) == getattr(other, key) for key in same) and self.work.is_like(
            other.work
        )

    @property
    def work(self) -> Work:
        """The work of these seconds."""
        return Work(self.passes, self.bytes, self.flops)


class Calibration(Frozen, extra="ignore"):
    """calibration.json of a study: how long steps of its finished Runs took.

    Files from before steps were kept hold other keys; the journals tell the same and more.
    """

    steps: tuple[StepTime, ...] = ()


@dataclass(frozen=True)
class Work:
    """The work of a rank in a step."""

    passes: float
    bytes: float
    flops: float

    def is_like(self, other: Work) -> bool:
        """True if it is the same to a hundredth."""
        mine, theirs = (self.passes, self.bytes, self.flops), (other.passes, other.bytes, other.flops)
        return all(abs(a / b - 1) < 0.01 for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Device:
    """The device of a rank."""

    kind: str
    """cpu or cuda."""
    name: str | None = None
    """A GPU's, or a profile's word for it, such as h100."""
    peak_flops: float | None = None
    threads: int = 1
    mfu: float | None = None
    """Share of the peak that training reaches, where the site knows it."""

    def is_alike(self, step: StepTime) -> bool:
        """True if steps were timed on such a device; a name that is not known excludes none."""
        return self.kind == step.device and same_device(self.name, step.device_name)


def same_device(one: str | None, other: str | None) -> bool:
    """True if two names may mean one type of GPU: `h100` is in `NVIDIA H100 80GB HBM3`."""
    if one is None or other is None:
        return True
    one, other = one.lower(), other.lower()
    return one in other or other in one


def step_work(run: Run, layout: Layout, text_positions: int, *, on_cuda: bool) -> Work:
    """The work of a rank in a step of a Run on a layout."""
    model = run.model
    saved = activation_bytes(model, run.frames, layout.micro_batch, precision=run.precision, on_cuda=on_cuda)
    share = run.batch * run.frames / layout.ranks
    again = 4 / 3 if layout.activation_checkpointing else 1.0
    return Work(
        passes=float(model.n_blocks * len(model.architecture.sub_layers) + 2) * layout.accumulation * again,
        bytes=saved * layout.accumulation,
        flops=training_flops(model, run.frames, text_positions) * share * again,
    )


class Speeds:
    """Predicts the seconds of a step from what has been timed so far."""

    def __init__(self, steps: Sequence[StepTime]) -> None:
        self.steps = tuple(steps)
        self._factors: dict[tuple[Device, str, Precision], tuple[float, float, str]] = {}

    def seconds(self, architecture: str, run: Run, work: Work, device: Device) -> tuple[Estimate, str]:
        """Seconds of a step, and in a word what they rest on: measured, calibrated, borrowed or assumed."""
        timed = [
            step.seconds
            for step in self.steps
            if step.architecture == architecture
            and device.is_alike(step)
            and step.precision is run.precision
            and (step.threads == device.threads or device.kind == "cuda")
            and step.work.is_like(work)
        ]
        if timed:
            return _spread(median_high(timed), KNOWN_SPREAD), "measured"
        calls, busy = default_seconds(work, device)
        key = (device, architecture, run.precision)
        if key not in self._factors:
            self._factors[key] = self._fitted(*key)
        launches, arithmetic, source = self._factors[key]
        expected = calls * launches + busy * arithmetic
        if source == "assumed":
            if device.kind == "cuda":
                slow, fast = (1.4, 0.75) if device.mfu else (MFU.expected / MFU.low, MFU.expected / MFU.high)
                return Estimate(calls / 2 + busy * fast, expected, 2 * calls + busy * slow), source
            return _spread(expected, CPU_SPREAD), source
        return _spread(expected, ALIKE_SPREAD if source == "calibrated" else OTHER_SPREAD), source

    def _fitted(self, device: Device, architecture: str, precision: Precision) -> tuple[float, float, str]:
        usable = [step for step in self.steps if device.is_alike(step) and step.precision is precision]
        own = [step for step in usable if step.architecture == architecture]
        if not usable:
            return 1.0, 1.0, "assumed"
        chosen = own or usable
        timed = []
        for step in chosen:
            theirs = replace(device, threads=step.threads)
            timed.append((*default_seconds(step.work, theirs), step.seconds))
        machine, balance = fit_factors(timed)
        return math.exp(machine + balance), math.exp(machine - balance), "calibrated" if own else "borrowed"


def default_seconds(work: Work, device: Device) -> tuple[float, float]:
    """Seconds of launches and seconds of arithmetic and traffic, before anything was measured."""
    if device.kind == "cuda":
        reached = (device.mfu or MFU.expected) * (device.peak_flops or GPU_FLOPS)
        return work.passes * GPU_PASS_SECONDS, work.flops / reached
    threads = device.threads
    busy = work.flops / (CPU_FLOPS_A_THREAD * threads) + work.bytes / (CPU_BYTES_A_SECOND * threads**0.5)
    return work.passes * CPU_PASS_SECONDS, busy


def fit_factors(timed: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Logarithms of the machine's factor and of the balance, from (launches, arithmetic, measured) seconds.

    Gauss-Newton on the squared deviations of log seconds and of both from their priors.
    """
    machine = balance = 0.0
    for _ in range(30):
        a, b, c = 1 / MACHINE_PRIOR**2, 0.0, 1 / BALANCE_PRIOR**2
        right = [-machine / MACHINE_PRIOR**2, -balance / BALANCE_PRIOR**2]
        for calls, busy, seconds in timed:
            up, down = calls * math.exp(machine + balance), busy * math.exp(machine - balance)
            slope = (up - down) / (up + down)
            off = math.log(seconds / (up + down))
            a, b, c = a + 1 / NOISE**2, b + slope / NOISE**2, c + slope**2 / NOISE**2
            right[0] += off / NOISE**2
            right[1] += slope * off / NOISE**2
        determinant = a * c - b * b
        step = (c * right[0] - b * right[1]) / determinant, (a * right[1] - b * right[0]) / determinant
        machine, balance = machine + step[0], balance + step[1]
        if max(map(abs, step)) < 1e-9:
            break
    return machine, balance


def _spread(expected: float, factors: tuple[float, float]) -> Estimate:
    return Estimate(factors[0] * expected, expected, factors[1] * expected)


RUNS_A_SIZE = 3
"""Finished Runs of a size that are read, the longest: their steps are hundreds already."""


def timed_steps(
    root: Root, study_name: str, rows: Sequence[RunStatus], text_positions: int
) -> list[StepTime]:
    """Every timed step known under ROOT: the study's own, what its journals add, and what other studies kept."""
    own = own_steps(root, study_name, rows, text_positions)
    return [*own, *_of_others(root, study_name)]


def own_steps(root: Root, study_name: str, rows: Iterable[RunStatus], text_positions: int) -> list[StepTime]:
    """Timed steps in calibration.json, and those of finished Runs that it does not hold yet."""
    held = read_model_if_there(root.study(study_name) / "calibration.json", Calibration)
    kept = list(held.steps) if held else []
    known = {run_id for step in kept for run_id in step.runs}
    done: dict[tuple[str, str], list[RunStatus]] = {}
    for row in rows:
        if row.state is RunState.DONE:
            done.setdefault((row.point.architecture, row.point.size), []).append(row)
    for members in done.values():
        longest = sorted(members, key=lambda row: -row.point.run.iterations)[:RUNS_A_SIZE]
        read = tuple(row.run_id for row in longest)
        if known.issuperset(read):
            continue
        timed = [step for row in longest if (step := _timed(root, row, text_positions)) is not None]
        if timed:
            middle = sorted(timed, key=lambda step: step.seconds)[len(timed) // 2]
            kept = [step for step in kept if not step.is_of(middle)]
            kept.append(middle.model_copy(update={"runs": read}))
    return kept


def write_calibration(root: Root, study_name: str, rows: Iterable[RunStatus], text_positions: int) -> None:
    """Keep the timed steps of the study's finished Runs."""
    calibration = Calibration(steps=tuple(own_steps(root, study_name, rows, text_positions)))
    write_model(root.study(study_name) / "calibration.json", calibration, exclude_defaults=True)


def _of_others(root: Root, study_name: str) -> list[StepTime]:
    found: list[StepTime] = []
    for path in sorted((root.path / "studies").glob("*/calibration.json")):
        if path.parent.name == study_name:
            continue
        try:
            found += read_model(path, Calibration).steps
        except InputError:
            continue  # that study's own verbs say so
    return found


def _timed(root: Root, row: RunStatus, text_positions: int) -> StepTime | None:
    """The median step of a finished Run, trunk and decay; None where its journals do not tell."""
    own = read_progress(root.run(row.run_id))
    if own.state != Event.FINISHED or own.started is None:
        return None
    trunk = read_progress(root.series(row.series_id))
    if any(span.gpu_share < 1 for span in (*trunk.spans, *own.spans)):
        return None
    layout = Layout.model_validate(
        {key: value for key, value in own.started.get("layout", {}).items() if key in Layout.model_fields}
    )
    # The first interval holds what is done once: caches, and memory that is asked for.
    events = [
        event
        for journal in (trunk, own)
        for step, event in sorted(journal.steps.items())
        if step > 1 and event.get("tokens_per_second", 0) > 0
    ]
    if not events:
        return None
    run = row.point.run
    device = str(own.started.get("device", "cpu")).split(":")[0]
    work = step_work(run, layout, text_positions, on_cuda=device == "cuda")
    return StepTime(
        architecture=row.point.architecture,
        size=row.point.size,
        device=device,
        device_name=own.started.get("device_name"),
        precision=run.precision,
        ranks=layout.ranks,
        threads=layout.threads,
        passes=work.passes,
        bytes=work.bytes,
        flops=work.flops,
        seconds=run.tokens_a_step / median(event["tokens_per_second"] for event in events),
    )
