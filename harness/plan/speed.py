"""Seconds of an optimiser step: launches of each sub-layer, memory traffic and arithmetic.

A small model's step is launches and memory traffic, a large one's is arithmetic, so the FLOP/s of one size predict no
other size. Three terms are added up, and timed steps correct them by two factors: one for the machine, which a single
finished run shows, and one for the balance between launches and arithmetic, which needs runs of two sizes. Without
measurements both stay near 1 (a maximum a posteriori estimate with log-normal priors).

Timed steps come from the journals of finished Runs and are kept in the study's calibration.json; those kept by other
studies under the same ROOT count too. Only the longest finished Runs of each size are read, and only once, so that
planning reads a few journals and not ten thousand. Runs that shared a GPU are left out: their speed depended on the
other Runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_high
from typing import Annotated, NamedTuple

from pydantic import Field

from harness.common.format import GIB, Estimate
from harness.plan.memory import activation_bytes, how_computed, memory
from harness.record.journal import Event, read_progress
from harness.record.root import Layout, Root, read_model, read_model_if_there, write_model
from harness.record.status import RunState, RunStatus
from harness.study.run import Count, Frozen, Positive, Precision, Run
from ssmttm.errors import InputError
from ssmttm.model.flops import training_flops

MFU = Estimate(0.15, 0.3, 0.5)
"""Share of a GPU's peak before any measurement: from small models with unfused kernels to large Transformers (46 % for
PaLM, arXiv 2204.02311, section 4; 52 % for Megatron, arXiv 2104.04473, table 1)."""
CPU_FLOPS_A_THREAD = 6e10
CPU_BYTES_A_SECOND = 4e9
CPU_PASS_SECONDS = 1.2e-3
"""A CPU thread, fitted to steps of the demo's models: matrix products; traffic of saved activations and of the backward
pass; and a sub-layer's forward and backward calls."""
GPU_PASS_SECONDS = 4e-4
"""Launches of a sub-layer's forward, backward and update on a GPU: some 60 kernels of 6 to 8 microseconds."""
GPU_FLOPS = 50e12
"""Peak of a GPU whose profile gives none."""
CPU_SPREAD = (0.4, 2.5)
"""Low and high over expected on a CPU before any measurement."""
KNOWN_SPREAD = (0.9, 1.12)
ALIKE_SPREAD = (0.75, 1.33)
OTHER_SPREAD = (0.55, 1.8)
"""The same after a run of this shape, of this architecture, or of another architecture has been timed."""
MACHINE_PRIOR, BALANCE_PRIOR, NOISE = 1.0, 0.35, 0.1
"""Standard deviations of the logarithms: of a machine against the defaults, of launches against arithmetic, and of a
timed run."""


LEAST_MEASURED = GIB
"""Fewest expected bytes of a Run whose peak tells of larger ones: workspaces of cuBLAS take a part of any peak."""


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
    memory: Positive | None = None
    """Measured peak of a GPU's memory over the expected one."""
    runs: tuple[str, ...] = ()
    """Ids of the Runs whose journals gave it."""

    def is_of(self, other: StepTime) -> bool:
        """True if both time the same work on the same device."""
        same = ("architecture", "size", "device", "device_name", "precision", "ranks", "threads")
        return self.work.is_like(other.work) and all(
            getattr(self, key) == getattr(other, key) for key in same
        )

    @property
    def work(self) -> Work:
        """Work done in these seconds."""
        return Work(self.passes, self.bytes, self.flops)


class Calibration(Frozen, extra="ignore"):
    """calibration.json of a study: timed steps of its finished Runs; older files hold other keys, which are ignored."""

    steps: tuple[StepTime, ...] = ()


class Work(NamedTuple):
    """The work of a rank in a step."""

    passes: float
    bytes: float
    flops: float

    def is_like(self, other: Work) -> bool:
        """True if it is the same to a hundredth."""
        return all(abs(a / b - 1) < 0.01 for a, b in zip(self, other, strict=True))


@dataclass(frozen=True)
class Device:
    """The device of a rank."""

    kind: str
    """cpu or cuda."""
    name: str | None = None
    """Name of a GPU, as the driver or a profile gives it, such as h100."""
    peak_flops: float | None = None
    threads: int = 1
    mfu: float | None = None
    """Share of the peak that training reaches, where the site knows it."""

    def is_alike(self, step: StepTime) -> bool:
        """True if steps were timed on such a device; an unknown name excludes none."""
        return self.kind == step.device and same_device(self.name, step.device_name)


def same_device(one: str | None, other: str | None) -> bool:
    """True if two names may be those of one type of GPU, as h100 and NVIDIA H100 80GB HBM3."""
    if one is None or other is None:
        return True
    one, other = one.lower(), other.lower()
    return one in other or other in one


def step_work(run: Run, layout: Layout, text_positions: int, *, on_cuda: bool) -> Work:
    """Return the work of a rank in a step of a Run on a layout."""
    model = run.model
    how = how_computed(run.precision, on_cuda=on_cuda)
    saved = activation_bytes(model, run.frames, layout.micro_batch, how=how)
    share = run.batch * run.frames / layout.ranks
    again = 4 / 3 if layout.activation_checkpointing else 1.0
    return Work(
        passes=float(model.n_blocks * len(model.architecture.sub_layers) + 2) * layout.accumulation * again,
        bytes=saved * layout.accumulation,
        flops=training_flops(model, run.frames, text_positions) * share * again,
    )


class Speeds:
    """Predicts the seconds of a step from the steps timed so far."""

    def __init__(self, steps: Sequence[StepTime]) -> None:
        self.steps = tuple(steps)
        self._factors: dict[tuple[Device, str, Precision], tuple[float, float, str]] = {}

    def seconds(self, architecture: str, run: Run, work: Work, device: Device) -> tuple[Estimate, str]:
        """Predict the seconds of a step, with their basis: measured, calibrated, borrowed or assumed."""
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

    def measured_memory(self, architecture: str, precision: Precision, kind: str) -> float | None:
        """Return the measured peak of memory over the expected one on GPUs, in the largest Runs of an architecture.

        None before such a Run has finished.
        """
        asked = architecture, precision, kind
        measured = [
            (step.bytes, step.memory)
            for step in self.steps
            if step.memory is not None and (step.architecture, step.precision, step.device) == asked
        ]
        return max(measured)[1] if measured else None

    def _fitted(self, device: Device, architecture: str, precision: Precision) -> tuple[float, float, str]:
        usable = [step for step in self.steps if device.is_alike(step) and step.precision is precision]
        own = [step for step in usable if step.architecture == architecture]
        if not usable:
            return 1.0, 1.0, "assumed"
        timed = [
            (*default_seconds(step.work, replace(device, threads=step.threads)), step.seconds)
            for step in own or usable
        ]
        machine, balance = fit_factors(timed)
        return math.exp(machine + balance), math.exp(machine - balance), "calibrated" if own else "borrowed"


def default_seconds(work: Work, device: Device) -> tuple[float, float]:
    """Return the seconds of launches and those of arithmetic and traffic, before any measurement."""
    if device.kind == "cuda":
        reached = (device.mfu or MFU.expected) * (device.peak_flops or GPU_FLOPS)
        return work.passes * GPU_PASS_SECONDS, work.flops / reached
    threads = device.threads
    busy = work.flops / (CPU_FLOPS_A_THREAD * threads) + work.bytes / (CPU_BYTES_A_SECOND * threads**0.5)
    return work.passes * CPU_PASS_SECONDS, busy


def fit_factors(timed: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Fit the logarithms of the machine's factor and of the balance to (launches, arithmetic, measured) seconds.

    Gauss-Newton minimises the squared deviations of log seconds from the measured ones, and of both from their priors.
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
"""Finished Runs of a size that are read, the longest: they have hundreds of steps."""


def timed_steps(
    root: Root, study_name: str, rows: Sequence[RunStatus], text_positions: int
) -> list[StepTime]:
    """Return every timed step under ROOT: the study's own, and those that other studies kept."""
    found = own_steps(root, study_name, rows, text_positions)
    for path in sorted((root.path / "studies").glob("*/calibration.json")):
        if path.parent.name != study_name:
            with contextlib.suppress(InputError):  # commands on that study report it
                found += read_model(path, Calibration).steps
    return found


def own_steps(root: Root, study_name: str, rows: Iterable[RunStatus], text_positions: int) -> list[StepTime]:
    """Return the timed steps in calibration.json, and those of finished Runs that are not in it yet."""
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
    """Write the timed steps of the study's finished Runs to calibration.json."""
    calibration = Calibration(steps=tuple(own_steps(root, study_name, rows, text_positions)))
    write_model(root.study(study_name) / "calibration.json", calibration, exclude_defaults=True)


def _timed(root: Root, row: RunStatus, text_positions: int) -> StepTime | None:
    """Return the median step of a finished Run, trunk and decay; None if its journals do not hold it."""
    own = read_progress(root.run(row.run_id))
    if own.state != Event.FINISHED or own.started is None:
        return None
    trunk = read_progress(root.series(row.series_id))
    if any(span.gpu_share < 1 for span in (*trunk.spans, *own.spans)):
        return None
    layout = Layout.model_validate(
        {key: value for key, value in own.started.get("layout", {}).items() if key in Layout.model_fields}
    )
    # The first interval includes work that is done once: filling caches, and allocating memory.
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
    on_cuda = device == "cuda"
    work = step_work(run, layout, text_positions, on_cuda=on_cuda)
    # Of its newest attempt, which had this layout; what the first step takes is not yet the peak.
    used = [
        event["gpu_memory_gib"]
        for step, event in own.systems.items()
        if step > 1 and event["attempt"] == own.attempt and event.get("gpu_memory_gib", 0) > 0
    ]
    expected = memory(run, layout, on_cuda=on_cuda, is_fused=on_cuda and layout.fuses_mixers).allocated
    return StepTime(
        architecture=row.point.architecture,
        size=row.point.size,
        device=device,
        device_name=own.started.get("device_name"),
        precision=run.precision,
        ranks=layout.ranks,
        threads=layout.threads,
        **work._asdict(),
        seconds=run.tokens_a_step / median(event["tokens_per_second"] for event in events),
        memory=max(used) * GIB / expected if used and expected >= LEAST_MEASURED else None,
    )
