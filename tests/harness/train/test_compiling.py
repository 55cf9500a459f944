"""Compiled blocks train the same Run to rounding; where they cannot be compiled the journal says why."""

from __future__ import annotations

import os
import shutil
import stat
from typing import Any

import pytest
import torch
from safetensors import safe_open

from harness.record.root import Layout, Root
from harness.study.run import Precision
from harness.train import compiling
from harness.train.engine import Engine
from harness.train.precision import multiply_in
from harness.train.ranks import Ranks
from ssmttm.errors import InputError
from tests.harness.journals import read_events
from tests.harness.plan.runs import made_run
from tests.harness.trainer import StopAfter, losses, series_folder, train, undisturbed
from tests.studies import Fields


@pytest.fixture
def fields(study_fields: Fields, monkeypatch: pytest.MonkeyPatch) -> Fields:
    """One Run of a Transformer, captured as a graph without generating code, which takes a minute."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setenv(compiling.VARIABLE, "")
    monkeypatch.delenv(compiling.VARIABLE)
    study_fields["grid"] |= {"architectures": {"cross_transformer": {}}, "iterations": [5]}
    return study_fields


def layouts(root: Root) -> list[dict[str, Any]]:
    return [event["layout"] for event in read_events(series_folder(root)) if "layout" in event]


def warnings(root: Root) -> list[str]:
    return [event["text"] for event in read_events(series_folder(root)) if event["event"] == "warning"]


@pytest.mark.parametrize(
    ("stage", "checkpointed"),
    [(0, True), *(pytest.param(stage, False, marks=pytest.mark.verify) for stage in (0, 1, 2))],
)
def test_an_uncompiled_training_goes_on_compiled_and_the_journal_says_that_losses_agree_to_rounding(
    here: Root, fields: Fields, stage: int, checkpointed: bool
) -> None:
    settings = {"micro_batch": 2, "zero_stage": stage, "activation_checkpointing": checkpointed}
    assert train(here, fields, StopAfter(3), **settings) == ["preempted"]
    assert train(here, fields, compile=True, **settings) == ["finished"]
    assert [layout["compiled"] for layout in layouts(here)] == [False, True]
    assert warnings(here) == [
        "compiled is True and was False in the attempt before: losses agree to rounding, not to the bit"
    ]
    assert losses(here, fields) == pytest.approx(undisturbed(fields, **settings), rel=1e-5)
    (weights,) = here.path.glob("runs/*/checkpoints/model.safetensors")
    with safe_open(weights, "pt") as held:
        assert not [name for name in held.keys() if "_orig_mod" in name]  # noqa: SIM118  # a file, not a dictionary


@pytest.mark.verify
@pytest.mark.parametrize("architecture", ["prefix_simba", "cross_transformer"])
def test_generated_code_gives_the_same_losses(
    here: Root, fields: Fields, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++, which compiles for the CPU")
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    fields["grid"]["architectures"] = {architecture: {}}
    train(here, fields, compile=True)
    assert layouts(here)[0]["compiled"] is True, warnings(here)
    assert losses(here, fields) == pytest.approx(undisturbed(fields), rel=1e-5)


def test_where_blocks_cannot_be_compiled_training_goes_on_without_and_the_journal_says_why(
    here: Root, fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C compiler found")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    assert train(here, fields, compile=True) == ["finished"]
    (warning,) = warnings(here)
    assert warning.startswith("blocks are not compiled, so steps take longer and more memory: ")
    assert "no C compiler found" in warning
    assert layouts(here)[0]["compiled"] is False
    assert losses(here, fields) == undisturbed(fields)


def test_what_is_compiled_is_kept_below_root_where_no_other_user_can_write(
    here: Root, fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling._use_cache(here)
    folder = here.path / "cache" / f"torch-{os.geteuid()}"
    assert os.environ[compiling.VARIABLE] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    monkeypatch.delenv(compiling.VARIABLE)
    compiling._use_cache(here)
    assert compiling.VARIABLE not in os.environ


def test_no_engine_computes_a_tf32_run_on_a_cpu() -> None:
    run = made_run(
        {"architecture": "prefix_mamba", "n_blocks": 1, "d_model": 64, "text": {"dim": 8}}, precision="tf32"
    )
    with pytest.raises(InputError, match=r"training\.precision: tf32: GPUs from Ampere on .* has no GPU"):
        Engine(run, Layout(), Ranks(0, 1, "cpu"))


def test_float32_is_multiplied_as_tf32_only_if_the_run_asks_for_it_and_has_a_gpu() -> None:
    seen = {}
    for precision, device in [("tf32", "cuda:0"), ("fp32", "cuda:0"), ("tf32", "cpu"), ("bf16", "cuda:0")]:
        multiply_in(Precision(precision), device)
        seen[precision, device] = torch.backends.cuda.matmul.fp32_precision
    assert torch.get_float32_matmul_precision() == "highest"
    assert [key for key, value in seen.items() if value == "tf32"] == [("tf32", "cuda:0")]
