"""The optimum of a size and the law across sizes, recovered from made losses, with intervals that hold."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from harness.record.root import Root
from harness.study.tune import Tuned
from harness.tuning.space import Space
from harness.tuning.transfer import Note, find_optimum, fit_law, learn
from harness.tuning.trials import TrialOutcome, TrialRecord, TrialResult
from tests.harness.tuner import space_of
from tests.studies import Fields

Rates = npt.NDArray[np.float64]
NINE: Rates = np.geomspace(1e-3, 1e-1, 9)


def made_losses(
    rates: Rates, best: float, noise: float = 0.0, chance: np.random.Generator | None = None
) -> list[float]:
    """A parabola in log rate that steepens on the high side, as real losses do, with noise."""
    x = np.log(rates / best)
    scatter = 0.0 if chance is None else chance.normal(0, noise, len(rates))
    return list(2.0 + 0.15 * x**2 + 0.02 * np.maximum(x, 0) ** 3 + scatter)


def searched(best: float, chance: np.random.Generator, count: int = 12) -> Rates:
    """Learning rates of a search: some over all of the range, the others near the optimum."""
    wide = chance.uniform(math.log(1e-4), math.log(1e0), count // 3)
    near = math.log(best) + chance.normal(0, 0.5, count - count // 3)
    found: Rates = np.exp(np.concatenate([wide, near]))
    return found


def test_the_optimum_is_found_between_the_trials() -> None:
    found = find_optimum(NINE, made_losses(NINE, 0.013))
    assert found.is_vertex
    assert math.exp(found.log_rate) == pytest.approx(0.013, rel=0.1)
    assert min(abs(NINE - 0.013)) / 0.013 > 0.2  # no trial was as near


def test_intervals_of_the_optimum_hold_about_as_often_as_they_say(times: int) -> None:
    chance, held = np.random.default_rng(1), 0
    for _ in range(50 * times):
        rates = searched(0.02, chance)
        found = find_optimum(rates, made_losses(rates, 0.02, 0.01, chance))
        held += found.ci95[0] <= math.log(0.02) <= found.ci95[1]
    assert held / (50 * times) >= 0.8  # a dozen resampled trials promise a little more than they hold


def test_the_law_and_where_it_leads_are_recovered_with_intervals_that_hold(times: int) -> None:
    chance, slope_held, carried_held = np.random.default_rng(2), 0, 0
    sizes = [1e5, 3e5, 1e6]
    for _ in range(30 * times):
        optima = []
        for size in sizes:
            best = 0.05 * (size / 1e5) ** -0.4
            rates = searched(best, chance)
            optima.append(find_optimum(rates, made_losses(rates, best, 0.01, chance)))
        law = fit_law(sizes, optima)
        assert law is not None
        slope_held += law.slope_ci95[0] <= -0.4 <= law.slope_ci95[1]
        _, (low, high) = law.at(1e7)
        carried_held += low <= 0.05 * 100**-0.4 <= high
    assert slope_held / (30 * times) >= 0.85
    assert carried_held / (30 * times) >= 0.85


@pytest.mark.parametrize("count", [1, 3, 12])
def test_an_optimum_that_is_no_vertex_is_known_no_better_than_the_trials_beside_it_are_apart(
    count: int,
) -> None:
    rates = np.geomspace(0.01, 0.1, count)
    found = find_optimum(rates, made_losses(rates, 1.0))
    assert not found.is_vertex
    assert found.ci95[1] >= math.log(rates[-1]) + math.log(3)  # what no trial lies beyond may be anywhere
    assert found.error >= 0.25


def test_one_size_tells_no_law() -> None:
    optimum = find_optimum(NINE, made_losses(NINE, 0.01))
    assert fit_law([1e5], [optimum]) is None
    assert fit_law([1e5, 1e5], [optimum, optimum]) is None


# -- the learning rates of a study, from its trials


@pytest.fixture
def fields(study_fields: Fields) -> Fields:
    study_fields["grid"]["sizes"] = {
        "xs": {"n_blocks": 1, "d_model": 16},
        "s": {"n_blocks": 1, "d_model": 32},
        "m": {"n_blocks": 1, "d_model": 64},
    }
    study_fields["tune"] = {
        "sizes": ["xs", "s"],
        "search": {"optimiser.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
        "scale_by": "d_model",
    }
    return study_fields


def records(
    rates: Rates, losses: list[float], outcome: TrialOutcome = TrialOutcome.FINISHED
) -> list[TrialRecord]:
    ended = [TrialResult(outcome, loss if outcome is TrialOutcome.FINISHED else None) for loss in losses]
    values = [{"training.optimiser.lr": float(rate)} for rate in rates]
    return list(map(TrialRecord, range(len(rates)), values, ended))


def learned(space: Space, rates: Rates, best: float) -> tuple[Tuned, list[Note]]:
    """Learn from trials of both sizes at these rates, of which `best` is the best one there could be."""
    found, notes = learn(space, {case: records(rates, made_losses(rates, best)) for case in space.cases})
    assert found is not None
    return found, notes


def test_the_law_is_carried_to_the_sizes_that_were_not_searched(fields: Fields, here: Root) -> None:
    space, rates = space_of(here, fields), np.geomspace(1e-3, 1e-1, 13)
    best = {"xs": 0.02, "s": 0.01}
    trials = {case: records(rates, made_losses(rates, best[case.size])) for case in space.cases}
    tuned, notes = learn(space, trials)
    assert tuned is not None
    found = tuned.architectures["prefix_simba"]
    (carried,) = found.carried
    assert (carried.size, carried.d_model) == ("m", 64)
    assert carried.lr == pytest.approx(0.005, rel=0.15)
    assert carried.ci95[0] < carried.lr < carried.ci95[1]
    assert found.law is not None
    assert found.law.slope == pytest.approx(-1.0, abs=0.1)
    assert notes == []
    assert learn(space, trials) == (tuned, notes)
    one_more = {case: [*some, *records(np.array([0.05]), [3.0])] for case, some in trials.items()}
    other, _ = learn(space, one_more)
    assert other is not None
    assert other.fingerprint != tuned.fingerprint


@pytest.mark.parametrize(("best", "end"), [(1e-4, "low 0.001"), (1.0, "high 0.1")])
def test_an_optimum_at_the_edge_of_its_range_is_named(
    best: float, end: str, fields: Fields, here: Root
) -> None:
    _, notes = learned(space_of(here, fields), NINE, best)
    assert [note.code for note in notes] == ["optimum_at_edge"] * 2
    assert end in notes[0].text


@pytest.mark.parametrize(
    ("rates", "best", "taken"),
    [(np.geomspace(1e-3, 3e-2, 9), 0.1, 0.03), (np.array([0.003, 0.01, 0.03]), 0.01, 0.01)],
    ids=["outermost", "too-few"],
)
def test_without_a_vertex_among_the_trials_the_best_one_is_taken_with_a_note(
    rates: Rates, best: float, taken: float, fields: Fields, here: Root
) -> None:
    tuned, notes = learned(space_of(here, fields), rates, best)
    assert {size.lr for size in tuned.architectures["prefix_simba"].sizes} == {taken}
    assert [note.code for note in notes] == ["no_vertex"] * 2


def test_other_searched_keys_are_noted_beside_the_optimum(fields: Fields, here: Root) -> None:
    fields["tune"]["search"]["schedule.warmup"] = {"low": 1, "high": 3}
    _, (note,) = learned(space_of(here, fields), NINE, 0.01)
    assert note.code == "others_varied"
    assert note.text.endswith("trials in which training.schedule.warmup varied too")


def test_a_size_no_trial_of_which_finished_is_named_and_left_out(fields: Fields, here: Root) -> None:
    space, losses = space_of(here, fields), made_losses(NINE, 0.01)
    xs, s = space.cases
    tuned, notes = learn(space, {xs: records(NINE, losses), s: records(NINE, losses, TrialOutcome.FAILED)})
    assert tuned is not None
    assert [size.size for size in tuned.architectures["prefix_simba"].sizes] == ["xs"]
    assert [note.code for note in notes] == ["no_trial", "one_size"]
