"""A Run's identity depends on everything that decides its result, and on nothing else."""

import pytest

from harness.study.run import Optimiser, Run, Schedule, ScheduleKind
from ssmttm.model.architecture import Architecture
from ssmttm.model.config import ModelConfig
from ssmttm.text.config import TextConfig

MODEL = ModelConfig(
    architecture=Architecture("prefix_simba"),
    n_blocks=24,
    d_model=1024,
    text=TextConfig(encoder="frozen", dim=768),
)


def make(**changes: object) -> Run:
    fields = {
        "corpus": "ab" * 32,
        "text_encoder": "cd" * 32,
        "frames": 2588,
        "batch": 128,
        "iterations": 5000,
    }
    return Run.model_validate({"model": MODEL, "optimiser": Optimiser(lr=1e-4), **fields, **changes})


def test_the_id_of_a_run_never_moves() -> None:
    assert make().run_id == "bd7d68e62830"


def test_a_field_at_its_default_is_no_part_of_the_identity_or_of_the_canonical_json() -> None:
    spelled_out = make(
        seed=0, schedule=Schedule(kind=ScheduleKind.WSD, warmup=500), optimiser=Optimiser(lr=1e-4, eps=1e-7)
    )
    assert spelled_out.run_id == make().run_id
    assert "seed" not in make().canonical()
    assert Run.model_validate(make(seed=3).canonical()) == make(seed=3)


def test_defaults_never_change_because_ids_leave_them_out() -> None:
    fields = make().model_dump(mode="json")
    betas = {"beta1": 0.9, "beta2": 0.999}
    assert fields["optimiser"] == betas | {"lr": 1e-4, "eps": 1e-7, "weight_decay": 0.02, "grad_clip": 1.0}
    shape = {"decay_fraction": 0.2, "final_fraction": 0.005}
    assert fields["schedule"] == shape | {"kind": "wsd", "warmup": 500}
    dropouts = {"caption_dropout": 0.1, "position_dropout": 0.1}
    assert fields["regularisation"] == dropouts | {"label_smoothing": 0.1}
    plain = {"seed": 0, "precision": "fp32", "eval_clips": None, "recipe_version": 1}
    assert plain.items() <= fields.items()
    text = {"encoder": "frozen", "dim": 768, "patch": 8, "max_positions": 64}
    given = {"architecture": "prefix_simba", "n_blocks": 24, "d_model": 1024, "text": text}
    scan = {"d_state": 512, "d_conv": 4, "expand": 2, "ssm_head_dim": 64, "n_groups": 1}
    others = {"head_dim": 64, "ff_mult": 2, "dropout": 0.3, "n_codebooks": 1, "codebook_size": 1024}
    assert fields["model"] == given | scan | others | {"residual": "fp32"}


NUMBERS = {"seed": 1, "iterations": 10000, "batch": 64, "frames": 1000, "recipe_version": 2}
NAMES = {"corpus": "ef" * 32, "text_encoder": "ef" * 32, "precision": "bf16"}
PARTS = {"optimiser": Optimiser(lr=2e-4), "schedule": Schedule(warmup=100)}
SMALLER = {"model": MODEL.model_copy(update={"d_state": 64})}


@pytest.mark.parametrize(("field", "value"), [*(NUMBERS | NAMES | PARTS | SMALLER).items()])
def test_a_field_that_decides_the_result_changes_the_id(field: str, value: object) -> None:
    assert make(**{field: value}).run_id != make().run_id


def test_runs_that_differ_only_in_iterations_share_a_series_if_they_share_a_trunk() -> None:
    assert make(iterations=10000).series_id == make().series_id
    assert make(seed=1).series_id != make().series_id

    for kind in (ScheduleKind.COSINE, ScheduleKind.CONSTANT):  # which have no trunk
        schedule = Schedule(kind=kind)
        assert make(iterations=10000, schedule=schedule).series_id != make(schedule=schedule).series_id
