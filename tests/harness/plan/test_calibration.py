"""calibration.json: timed steps of finished Runs, read once and used however the study changes."""

from __future__ import annotations

import shutil

import pytest

from harness.common.format import GIB
from harness.plan.memory import CUDA_CONTEXT, memory
from harness.plan.speed import Speeds, own_steps, write_calibration
from harness.record.journal import Event
from harness.record.root import Layout, Root
from harness.study.run import Precision
from tests.harness.conftest import PlanOf
from tests.harness.journals import begin_run, begin_series, finish, log_steps, registered, rows_of
from tests.harness.nvml import H100, install
from tests.studies import Fields


def trained(root: Root, fields: Fields, tokens_per_second: float, device: str = "cpu", **more: float) -> None:
    """Finish every Run of a study on one rank at this speed."""
    for point in registered(root, fields).points:
        begin_series(root, point.run).close()
        journal = begin_run(root, point.run, layout={"ranks": 1, "micro_batch": 8}, device=device, **more)
        log_steps(journal, [2, 3], tokens_per_second=tokens_per_second)
        finish(journal, point.run)


def speeds(root: Root, fields: Fields) -> dict[str, list[float]]:
    """Tokens a second by device, by calibration.json and the journals."""
    found: dict[str, list[float]] = {}
    for step in own_steps(root, "tiny", rows_of(root, fields), 4):
        found.setdefault(step.device, []).append(round(8 * 50 * 2 / step.seconds))
    return found


@pytest.fixture
def one_length(study_fields: Fields) -> Fields:
    study_fields["grid"] |= {"iterations": [10]}
    return study_fields


def kept(root: Root, fields: Fields) -> None:
    write_calibration(root, "tiny", rows_of(root, fields), 4)


def test_kept_steps_are_not_read_again(one_length: Fields, here: Root) -> None:
    trained(here, one_length, 1000.0)
    rows = rows_of(here, one_length)
    kept(here, one_length)
    before = own_steps(here, "tiny", rows, 4)
    shutil.rmtree(here.path / "runs")
    assert own_steps(here, "tiny", rows, 4) == before
    assert len(before) == 1


def test_a_size_that_means_another_model_is_timed_anew(one_length: Fields, here: Root) -> None:
    trained(here, one_length, 1000.0)
    kept(here, one_length)
    one_length["grid"]["sizes"]["xs"] |= {"n_blocks": 4}
    trained(here, one_length, 300.0)
    assert speeds(here, one_length) == {"cpu": [1000, 300]}


def test_longer_runs_elsewhere_join_those_of_before_and_newer_ones_here_replace_them(
    one_length: Fields, here: Root
) -> None:
    trained(here, one_length, 1000.0)
    kept(here, one_length)
    one_length["grid"]["iterations"] = [20]
    trained(here, one_length, 9000.0, device="cuda:0")
    assert speeds(here, one_length) == {"cpu": [1000], "cuda": [9000]}
    kept(here, one_length)
    one_length["grid"]["iterations"] = [40]
    trained(here, one_length, 500.0)
    assert speeds(here, one_length) == {"cpu": [500], "cuda": [9000]}


def test_runs_that_shared_a_gpu_are_left_out(one_length: Fields, here: Root) -> None:
    trained(here, one_length, 400.0, device="cuda:0", gpu_share=0.5)
    assert speeds(here, one_length) == {}
    one_length["grid"]["seeds"] = [1]
    trained(here, one_length, 1000.0, device="cuda:0")
    assert speeds(here, one_length) == {"cuda": [1000]}


def measured_on_gpu(root: Root, fields: Fields, kernels: str) -> float | None:
    """Finish every Run of a study on a GPU with a quarter more memory than expected; return what plans make of it."""
    for point in registered(root, fields).points:
        layout = Layout(micro_batch=8, kernels=kernels)
        expected = memory(point.run, layout, on_cuda=True, is_fused=kernels != "torch").allocated / GIB
        begin_series(root, point.run).close()
        journal = begin_run(root, point.run, layout=layout.model_dump(), device="cuda:0")
        log_steps(journal, [2, 3], tokens_per_second=1000.0)
        for step, share in ((1, 9.0), (2, 1.2), (3, 1.25)):  # the first step allocates what later ones reuse
            journal.append(Event.SYSTEM, step=step, gpu_memory_gib=share * expected)
        finish(journal, point.run)
    kept(root, fields)
    speeds = Speeds(own_steps(root, "tiny", rows_of(root, fields), 4))
    assert speeds.measured_memory("prefix_simba", Precision.BF16, "cuda") is None
    return speeds.measured_memory("prefix_simba", Precision.FP32, "cuda")


@pytest.mark.parametrize("kernels", ["torch", "mamba-ssm 2.3.2, causal-conv1d 1.7.0"])
def test_measured_peaks_of_gpus_correct_and_narrow_later_plans(
    one_length: Fields, here: Root, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    install(monkeypatch, H100)
    one_length |= {"root": str(here.path)}
    one_length["grid"]["sizes"] = {"l": {"n_blocks": 24, "d_model": 1024}}
    (before,) = plan_of(one_length)["runs"]
    assert measured_on_gpu(here, one_length, kernels) == pytest.approx(1.25)
    one_length["grid"]["seeds"] = [1]
    document = plan_of(one_length)
    (after,) = document["runs"]
    context = CUDA_CONTEXT / GIB
    assert after["memory_gib"] - context == pytest.approx(1.25 * (before["memory_gib"] - context), rel=0.01)
    widths = [run["memory_gib_high"] / run["memory_gib_low"] for run in (before, after)]
    assert widths[1] < widths[0]
    assert "memory_estimated" not in {note["code"] for note in document["design"]["notes"]}


def test_peaks_of_the_smallest_runs_tell_nothing_of_others(one_length: Fields, here: Root) -> None:
    assert measured_on_gpu(here, one_length, "torch") is None
