"""Resources of a Series: the fewest GPUs on which it fits and ends in time, each choice with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.common.format import Estimate
from harness.plan.cluster import Cluster
from harness.plan.memory import memory
from harness.plan.resources import Refused, choose_resources, remember, what_would_fit
from harness.record.root import Layout
from harness.study.run import Precision, Run
from harness.study.schema import ResourceChoice
from ssmttm.errors import InputError
from tests.harness.plan.runs import made_run

H100 = Cluster("h100x8", 4, 8, 112, 1900.0, gpu_memory_gib=79.6, gpu_type="h100", hours=24.0)
AUTOMATIC = ResourceChoice(ranks=None)


def run_of(d_model: int, blocks: int, batch: int = 128) -> Run:
    text = {"encoder": "frozen", "dim": 768, "max_positions": 64}
    model = {"architecture": "prefix_simba", "n_blocks": blocks, "d_model": d_model, "text": text}
    return made_run(model, frames=1024, batch=batch, precision="bf16")


def test_a_small_model_takes_one_gpu_and_a_part_of_it() -> None:
    chosen = choose_resources(run_of(256, 4, batch=8), AUTOMATIC, H100)
    assert (chosen.layout.ranks, chosen.layout.zero_stage) == (1, 0)
    assert chosen.gpu_fraction < 1
    assert chosen.memory.gib.high <= chosen.gpu_fraction * 79.6
    assert "fewest" in chosen.why["ranks"]


def test_blocks_are_compiled_on_gpus_unless_the_study_says_otherwise_and_never_under_zero_3() -> None:
    run, cpu = run_of(256, 4, batch=8), Cluster("local", 1, 0, 8, 64.0)
    off, stage_3 = ResourceChoice(compile=False), ResourceChoice(compile=True, zero_stage=3)
    chosen = [choose_resources(run, choice, H100) for choice in (AUTOMATIC, off, stage_3)]
    assert [one.layout.compiled for one in chosen] == [True, False, False]
    assert "ZeRO 3" in chosen[2].why["compile"]
    assert not choose_resources(run, ResourceChoice(), cpu).layout.compiled
    assert choose_resources(run, ResourceChoice(compile=True), cpu).layout.compiled


def test_a_tf32_run_is_planned_on_gpus_alone_and_takes_the_memory_of_float32() -> None:
    run = run_of(256, 4, batch=8)
    tf32, fp32 = (run.model_copy(update={"precision": Precision(name)}) for name in ("tf32", "fp32"))
    assert choose_resources(tf32, AUTOMATIC, H100).memory == choose_resources(fp32, AUTOMATIC, H100).memory
    with pytest.raises(InputError, match=r"training\.precision: tf32: local has no GPU"):
        choose_resources(tf32, AUTOMATIC, Cluster("local", 1, 0, 8, 64.0))


def test_a_bf16_residual_stream_takes_less_memory() -> None:
    run, checkpointed = run_of(1024, 24), ResourceChoice(micro_batch=8, activation_checkpointing=True)
    rounded = run.model_copy(update={"model": run.model.model_copy(update={"residual": "bf16"})})
    for choice in (ResourceChoice(micro_batch=8), checkpointed):
        less, more = (choose_resources(one, choice, H100).memory.activations for one in (rounded, run))
        assert 0.5 < less / more < 0.99


def test_a_model_too_large_for_one_gpu_takes_the_fewest_that_hold_it() -> None:
    run = run_of(5120, 40)  # 6 billion parameters: 90 GiB of states
    chosen = choose_resources(run, AUTOMATIC, H100)
    assert chosen.layout.ranks > 1
    assert chosen.layout.zero_stage > 0
    assert chosen.memory.gib.high <= 79.6
    assert chosen.layout.ranks * chosen.layout.micro_batch * chosen.layout.accumulation == run.batch
    fewer = ResourceChoice(
        ranks=chosen.layout.ranks // 2, zero_stage=3, activation_checkpointing=True, micro_batch=1
    )
    assert choose_resources(run, fewer, H100).memory.gib.high > 79.6
    assert {"ranks", "zero_stage", "micro_batch"} <= set(chosen.why)


@pytest.mark.parametrize(
    ("expected", "ranks", "why"),
    [
        (100.0, 8, "24 h"),  # 4 take 25 hours, 8 the 12.5 that are below 24; others do not divide 128
        (1e4, 32, "requeued"),
    ],
)
def test_a_time_limit_takes_more_gpus_than_memory_does_up_to_all_there_are(
    expected: float, ranks: int, why: str
) -> None:
    def hours(layout: Layout) -> Estimate:
        return Estimate(expected / 2, expected, 2 * expected) * (1 / layout.ranks)

    chosen = choose_resources(run_of(1024, 24), AUTOMATIC, H100, hours=hours)
    assert chosen.layout.ranks == ranks
    assert why in chosen.why["ranks"]


def test_resources_that_a_study_gives_are_taken_unchanged() -> None:
    asked = ResourceChoice(ranks=2, zero_stage=1, micro_batch=3)
    layout = choose_resources(run_of(1024, 24), asked, H100).layout
    assert (layout.ranks, layout.zero_stage, layout.micro_batch, layout.accumulation) == (2, 1, 2, 32)
    plain = choose_resources(run_of(1024, 24), ResourceChoice(), H100).layout
    assert (plain.ranks, plain.zero_stage, plain.activation_checkpointing) == (1, 0, False)


def test_activation_checkpointing_is_taken_where_nothing_fits_without() -> None:
    run = run_of(768, 12, batch=2)
    asked = [ResourceChoice(micro_batch=1, activation_checkpointing=on) for on in (False, True)]
    without, with_it = (choose_resources(run, one, H100).memory.gib.high for one in asked)
    small = Cluster("small", 1, 1, 8, 64.0, gpu_memory_gib=(without + with_it) / 2)
    chosen = choose_resources(run, AUTOMATIC, small)
    assert chosen.layout.activation_checkpointing
    assert "fits without" in chosen.why["activation_checkpointing"]


def test_more_ranks_than_a_job_may_have_are_refused() -> None:
    with pytest.raises(InputError, match=r"resources.ranks: 64: a job on h100x8 has at most 32 GPUs"):
        choose_resources(run_of(256, 4), ResourceChoice(ranks=64), H100)


def test_a_micro_batch_that_ran_out_of_memory_is_halved_for_every_series_of_that_shape(
    tmp_path: Path,
) -> None:
    folder, run = tmp_path, run_of(1024, 24)
    before = choose_resources(run, ResourceChoice(), H100).layout
    remember(folder, run, before, "cuda:0", "NVIDIA H100 80GB HBM3")
    another_seed = run.model_copy(update={"seed": 7, "iterations": 99})
    after = choose_resources(another_seed, ResourceChoice(), H100, refused=Refused(folder))
    assert after.layout.micro_batch == before.micro_batch // 2
    assert "ran out of memory" in after.why["micro_batch"]
    assert after.layout.micro_batch * after.layout.accumulation == run.batch
    elsewhere = Cluster("a100", 4, 8, 112, 1900.0, gpu_memory_gib=79.6, gpu_type="a100")
    assert choose_resources(run, ResourceChoice(), elsewhere, refused=Refused(folder)).layout == before
    larger = run_of(1024, 25)
    assert choose_resources(larger, ResourceChoice(), H100, refused=Refused(folder)).layout == before


def test_a_failure_beside_other_work_counts_for_its_own_series_alone(tmp_path: Path) -> None:
    run = run_of(1024, 24)
    layout = choose_resources(run, ResourceChoice(), H100).layout
    remember(tmp_path, run, layout, "cuda:0", "NVIDIA H100 80GB HBM3", alone=False)
    refused = Refused(tmp_path)
    assert (
        choose_resources(run, ResourceChoice(), H100, refused=refused).layout.micro_batch < layout.micro_batch
    )
    other = run.model_copy(update={"seed": 7})
    assert choose_resources(other, ResourceChoice(), H100, refused=refused).layout == layout


def test_remedies_are_one_sentence_with_keys_of_the_study() -> None:
    run = run_of(1024, 24).model_copy(update={"frames": 8192})
    said = what_would_fit(run, Layout(micro_batch=1, accumulation=128), on_cuda=True)
    assert "activation_checkpointing: true" in said
    assert "\n" not in said


def test_remedies_count_with_the_kernels_of_the_attempt() -> None:
    run, layout = run_of(1024, 24), Layout(accumulation=128)
    fused = layout.model_copy(update={"kernels": "mamba-ssm 2.3.2, causal-conv1d 1.7.0"})
    for one, is_fused in ((fused, True), (layout.model_copy(update={"kernels": "mamba-ssm 2.3.2"}), False)):
        taken = memory(run, layout, on_cuda=True, is_fused=is_fused).gib.expected
        assert f"takes about {taken:.3g} GiB a rank" in what_would_fit(run, one, on_cuda=True)


def test_a_small_memory_takes_smaller_micro_batches() -> None:
    run, roomy, tight = (
        run_of(64, 1, batch=8),
        Cluster("roomy", 1, 0, 2, 16.0),
        Cluster("tight", 1, 0, 2, 0.5),
    )
    assert choose_resources(run, ResourceChoice(), roomy).layout.micro_batch == 8
    assert choose_resources(run, ResourceChoice(), tight).layout.micro_batch < 8
