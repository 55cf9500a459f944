"""Predicted costs of a run: counts compared with built models, and hours corrected by measured steps."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from harness.common.format import Estimate
from harness.plan.estimate import run_cost
from harness.plan.speed import (
    ALIKE_SPREAD,
    Device,
    Speeds,
    StepTime,
    default_seconds,
    fit_factors,
    same_device,
    step_work,
)
from harness.record.root import Layout
from harness.study.run import Run
from ssmttm.model.architecture import ARCHITECTURES
from ssmttm.model.chunks import even_chunk
from ssmttm.model.flops import forward_flops, training_flops
from ssmttm.model.layers.layer import FlopConvention
from tests.harness.plan.runs import made_run


def drawn(seed: int) -> Run:
    """A small run of any backbone."""
    draw = random.Random(seed)
    model = {
        "architecture": list(ARCHITECTURES)[seed % 4],
        "n_blocks": draw.randint(1, 3),
        "d_model": 32 * draw.randint(1, 4),
        "d_state": draw.choice([8, 16, 48, 160]),
        "ssm_head_dim": draw.choice([16, 32]),
        "d_conv": draw.choice([2, 4]),
        "expand": draw.choice([1, 2]),
        "head_dim": draw.choice([16, 32]),
        "ff_mult": draw.choice([2, 4]),
        "n_codebooks": draw.choice([1, 2, 4]),
        "codebook_size": draw.choice([64, 1024]),
        "text": {"dim": draw.choice([16, 48]), "max_positions": 16, "patch": draw.choice([4, 8])},
    }
    return made_run(
        model,
        frames=draw.choice([40, 96, 150]),
        batch=draw.choice([1, 2, 8]),
        iterations=draw.randint(1, 1000),
    )


@pytest.mark.parametrize("count", [16, pytest.param(60, marks=pytest.mark.verify)])
def test_parameters_are_exact_and_operations_those_of_the_built_model(count: int) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from ssmttm.model.music_lm import MusicLM
    from ssmttm.text.byte_encoder import collate_bytes
    from tests.ssmttm.small import count_parameters

    for seed in range(count):
        run = drawn(seed)
        model, frames = run.model, run.frames
        built = MusicLM(model).eval()
        steps = frames + model.n_codebooks - 1
        text = collate_bytes(["a slow dance for strings, in a minor key"], [False], model.text)
        positions = text.mask.shape[1]
        cost = run_cost(run, positions)
        assert cost.n_params == count_parameters(built).n_params
        assert cost.n_params_non_embedding == count_parameters(built).non_embedding
        assert cost.tokens == run.iterations * run.batch * frames * model.n_codebooks
        each = training_flops(model, frames, positions)
        assert cost.flops == pytest.approx(run.iterations * run.batch * frames * each)

        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            built(torch.zeros(1, model.n_codebooks, steps, dtype=torch.int64), text)
        length = steps + (positions if model.architecture.has_prefix else 0)
        chunk = even_chunk(model.d_state, length)
        counted = forward_flops(model, frames, positions, FlopConvention(attention="full", scan_chunk=chunk))
        # The counter sees matrix products alone, those of a chunk's padding with the rest.
        mixers = model.n_blocks * model.architecture.sub_layers.count("mamba2")
        mixed = model.d_inner + 2 * model.n_groups * model.d_state
        convolutions = mixers * 2 * model.d_conv * mixed * length / frames
        expected = counted.forward + counted.text_encoder - convolutions
        expected += counted.layers.get("scan", 0.0) * (chunk * math.ceil(length / chunk) / length - 1)
        assert counter.get_total_flops() / frames == pytest.approx(expected, rel=0.01), seed


# -- hours

CPU = Device("cpu")


def timed(
    run: Run, device: Device, *, launches: float = 1.0, arithmetic: float = 1.0, **changes: Any
) -> StepTime:
    """Steps on a machine whose launches and arithmetic are this many times slower than assumed."""
    work = step_work(run, Layout(micro_batch=run.batch), 4, on_cuda=device.kind == "cuda")
    calls, busy = default_seconds(work, device)
    fields = {"architecture": run.model.architecture, "size": "any", "precision": run.precision}
    fields |= {"device": device.kind, "device_name": device.name, **work._asdict()}
    fields["seconds"] = launches * calls + arithmetic * busy
    return StepTime.model_validate(fields | changes)


def sized(d_model: int, blocks: int, architecture: str = "prefix_simba", precision: str = "fp32") -> Run:
    model = {"architecture": architecture, "n_blocks": blocks, "d_model": d_model, "text": {"dim": 16}}
    model |= {"d_state": 16, "ssm_head_dim": 16, "head_dim": 16, "n_codebooks": 2, "codebook_size": 256}
    return made_run(model, precision=precision)


def seconds_of(speeds: Speeds, run: Run, device: Device = CPU) -> tuple[Estimate, str]:
    work = step_work(run, Layout(micro_batch=run.batch), 4, on_cuda=device.kind == "cuda")
    return speeds.seconds(str(run.model.architecture), run, work, device)


def predicted(speeds: Speeds, run: Run, device: Device = CPU) -> tuple[float, str]:
    seconds, source = seconds_of(speeds, run, device)
    assert seconds.low < seconds.expected < seconds.high
    return seconds.expected, source


def test_one_finished_run_corrects_the_hours_of_every_size_of_its_architecture() -> None:
    small, large = sized(16, 1), sized(256, 4)
    slow = [timed(small, CPU, launches=2.0, arithmetic=2.0)]
    assert predicted(Speeds([]), large)[1] == "assumed"
    after, source = predicted(Speeds(slow), large)
    assert source == "calibrated"
    assert after == pytest.approx(2 * predicted(Speeds([]), large)[0], rel=0.05)


def test_two_sizes_distinguish_slow_launches_from_slow_arithmetic() -> None:
    runs = [sized(16, 1), sized(256, 4)]
    seen = [timed(run, CPU, launches=4.0, arithmetic=1.0) for run in runs]
    middle = sized(64, 2)
    truth = timed(middle, CPU, launches=4.0, arithmetic=1.0).seconds
    assert predicted(Speeds(seen), middle)[0] == pytest.approx(truth, rel=0.1)
    assert abs(predicted(Speeds(seen[:1]), middle)[0] / truth - 1) > 0.1


def test_a_measured_run_is_predicted_as_measured() -> None:
    run = sized(64, 2)
    assert predicted(Speeds([timed(run, CPU, seconds=0.5)]), run) == (0.5, "measured")


def test_without_own_runs_another_architectures_count_with_a_wider_range() -> None:
    seen = [timed(sized(64, 2, "cross_transformer"), CPU, launches=3.0, arithmetic=3.0)]
    borrowed, source = seconds_of(Speeds(seen), sized(64, 2))
    assert source == "borrowed"
    assert borrowed.high / borrowed.expected > ALIKE_SPREAD[1]


def test_a_gpu_is_corrected_by_runs_on_its_own_type_alone() -> None:
    h100 = Device("cuda", "h100", peak_flops=989e12)
    run, other = sized(1024, 24, precision="bf16"), sized(512, 12, precision="bf16")
    on = {
        name: [timed(other, h100, arithmetic=2.0, launches=2.0, device_name=name)]
        for name in ("A100", "H100 SXM")
    }
    assert predicted(Speeds(on["A100"]), run, h100)[1] == "assumed"
    assert predicted(Speeds(on["H100 SXM"]), run, h100)[1] == "calibrated"
    assert same_device("h100", "NVIDIA H100 80GB HBM3")
    assert not same_device("a100", "NVIDIA H100 80GB HBM3")


def test_before_anything_ran_the_hours_of_a_gpu_span_the_known_shares_of_its_peak() -> None:
    run = sized(2048, 24, precision="bf16")
    device = Device("cuda", "h100", peak_flops=989e12)
    work = step_work(run, Layout(micro_batch=8), 4, on_cuda=True)
    seconds, _ = seconds_of(Speeds([]), run, device)
    assert seconds.low > work.flops / (0.5 * 989e12)
    assert seconds.expected > work.flops / (0.3 * 989e12)
    assert seconds.high > work.flops / (0.15 * 989e12)
    known, _ = seconds_of(Speeds([]), run, Device("cuda", "h100", 989e12, mfu=0.4))
    assert known.expected < seconds.expected
    assert known.high / known.low < seconds.high / seconds.low


def test_noise_in_the_measurements_moves_the_factors_little() -> None:
    draw = random.Random(0)
    sizes = [(1.0, 0.1), (1.0, 1.0), (1.0, 10.0)] * 5
    seen = [(a, b, (2 * a + 3 * b) * math.exp(draw.gauss(0, 0.1))) for a, b in sizes]
    machine, balance = fit_factors(seen)
    assert math.exp(machine + balance) == pytest.approx(2, rel=0.1)
    assert math.exp(machine - balance) == pytest.approx(3, rel=0.1)
