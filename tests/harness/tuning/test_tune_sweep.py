"""Tuning compared with an exhaustive sweep of the same learning rates, by real training."""

from __future__ import annotations

import math
import statistics

import pytest

from harness.record.root import Root
from harness.tuning.trials import finished
from tests.harness.trainer import losses, train
from tests.harness.tuner import tuned_here, with_rate
from tests.studies import Fields

LOW, HIGH, STEPS = 1e-3, 3e-1, 60


@pytest.mark.verify
@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_tuning_ends_within_a_seeds_noise_of_a_sweep_at_a_third_of_its_steps(
    sampler: str, study_fields: Fields, here: Root
) -> None:
    study_fields["grid"]["iterations"] = [STEPS]
    study_fields["training"]["schedule"] = {"warmup": 6}
    swept = []
    for place in range(25):  # evenly over two and a half decades
        rate = float(f"{LOW * (HIGH / LOW) ** (place / 24):.3g}")
        swept.append((loss_at(here, study_fields, rate), rate))
    best, best_rate = min(swept)
    noise = statistics.stdev(loss_at(here, study_fields, best_rate, seed) for seed in range(5))

    study_fields["tune"] = {
        "sizes": ["xs"],
        "trials": 8,
        "sampler": sampler,
        "search": {"optimiser.lr": {"low": LOW, "high": HIGH, "log": True}},
    }
    controller, place_of_training = tuned_here(here, study_fields)
    (case,) = controller.space.cases
    found, rate = min(
        (loss, one.values["training.optimiser.lr"]) for one, loss in finished(controller.records(case))
    )
    print(
        f"\nsweep: {best:.4f} at {best_rate:g} in {25 * STEPS} steps; {sampler}: {found:.4f} at {rate:g} in "
        f"{len(place_of_training.trained) * STEPS} steps; sd of seeds {noise:.4f}"
    )
    assert len(place_of_training.trained) * 3 <= 25
    assert math.log(HIGH / LOW, 10) > 2
    assert found <= best + noise


def loss_at(root: Root, fields: Fields, rate: float, seed: int = 0) -> float:
    fields = with_rate(fields, rate, seed=seed)
    train(root, fields)
    (loss,) = losses(root, fields)
    return loss
