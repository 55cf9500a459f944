"""The effect of size, patterns in residuals, and conventions: noted where they are provoked, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.findings.comparison import fit_all
from analysis.findings.notes import design_notes, effect_notes
from analysis.findings.results import FitDocument
from analysis.fitting.checks import SIGNIFICANT, pattern
from analysis.laws.catalogue import law_named
from tests.analysis.conftest import checked, compared, fit, fitted, joined, note_codes
from tests.analysis.synthetic import SIX_SIZES, WIDE, SyntheticStudy, against


def p_of_size(table: pd.DataFrame) -> float:
    """Return the p-value of SiMBA's effect of size."""
    p = joined(checked(table))["prefix_simba"].size_effect
    assert p is not None
    return p


def test_a_loss_that_does_not_depend_on_size_gives_no_size_ratio() -> None:
    study = SyntheticStudy(laws=against(A=1e-9, E=2.8), sizes=SIX_SIZES, seeds=(2,) * 6)
    for seed in range(1, 4):
        assert p_of_size(study.table(seed)) > SIGNIFICANT
    document = fit(study)
    assert "no_size_effect" in note_codes(document)
    assert {row.status for row in document.comparison.size_ratio} == {"not_identified"}
    assert {row.ratio for row in document.comparison.size_ratio} == {None}


def test_as_many_points_as_parameters_tell_nothing_of_their_error() -> None:
    """Three sizes and three budgets that share a point: a law of five parameters meets all five."""
    table = SyntheticStudy(sizes=(1e5, 3e5, 1e6), seeds=(1,) * 3).table(0)
    document = fit(table[(table["iterations"] == 400) | (table["n_params"] == 1e5)])
    for row in (*document.comparison.size_ratio, *document.comparison.token_gain):
        assert (row.status, row.ci95) == ("not_identified", None)
        assert "as many parameters as points" in row.reason
    for one in document.architectures.values():
        assert (one.n_points, one.size_effect_p) == (5, None)
        assert {prediction.run95 for prediction in one.predictions} == {None}
    dumped = document.model_dump(mode="json")
    assert FitDocument.model_validate(dumped).model_dump(mode="json") == dumped


def test_larger_and_worse_is_no_effect_either() -> None:
    table = WIDE.table(0)
    simba = table["architecture"] == "prefix_simba"
    rise = table["n_params"].where(simba, 1.0) ** 0.02
    assert p_of_size(table.assign(loss=np.where(simba, 2.0 * rise, table["loss"]))) > SIGNIFICANT


@pytest.mark.parametrize(
    "study", [SyntheticStudy(), WIDE, SyntheticStudy(sizes=(1e5, 1e6, 1e7), seeds=(1,) * 3)]
)
def test_an_effect_that_is_there_is_found_with_few_series_too(study: SyntheticStudy) -> None:
    assert p_of_size(study.table(1)) < SIGNIFICANT


def test_a_bend_that_the_law_lacks_is_seen_in_the_residuals() -> None:
    table = replace(WIDE, cluster_noise=0.001).table(0)
    bend = 0.01 * (np.log(table["n_params"] / 1e6) * np.log(table["iterations"] / 600))
    bent, straight = (
        fitted(checked(one)) for one in (table.assign(loss=table["loss"] * np.exp(bend)), table)
    )
    (note,) = effect_notes(None, pattern(bent, 0))
    assert note.code == "structured_residuals"
    assert "size and data acting together" in note.text
    assert pattern(straight, 0) is None


def test_residuals_of_the_right_law_are_seldom_called_structured() -> None:
    fits = [fitted(checked(WIDE.table(seed))) for seed in range(20)]
    assert sum(pattern(one, seed=0) is not None for one in fits) <= 1


def test_a_count_of_parameters_that_changes_the_ratio_is_noted_and_one_that_does_not_is_not() -> None:
    table = WIDE.table(0)
    simba = table["architecture"] == "prefix_simba"
    alike = table.assign(n_params_non_embedding=0.9 * table["n_params"])
    assert not any(one.changes for one in compared(alike.drop(columns="flops")).conventions)
    heavy = table.assign(n_params_non_embedding=table["n_params"] * np.where(simba, 0.95, 0.1))
    document = fit(heavy.drop(columns="flops"))
    assert "convention_sensitive" in note_codes(document)
    (one,) = document.comparison.conventions
    assert (one.quantity, one.under, one.changes) == ("size_ratio", "n_params_non_embedding", True)
    assert one.value_under == pytest.approx(one.value * 0.1 / 0.95, rel=0.02)


def test_another_count_under_one_e_is_fitted_with_one_e_too() -> None:
    """Nine tenths of every size leave a law with one E and its ratio as they are; one E each would move both."""
    table = SyntheticStudy().table(0).drop(columns="flops")
    alike = table.assign(n_params_non_embedding=0.9 * table["n_params"])
    laws = (law_named("chinchilla"), law_named("chinchilla_shared_e"))
    (alone,), (one,) = (compared(alike, law=law).conventions for law in laws)
    assert one.value_under == pytest.approx(one.value, rel=1e-3)
    assert alone.value_under != pytest.approx(one.value, rel=0.01)


def test_a_count_of_flops_that_changes_the_gain_is_noted() -> None:
    table = WIDE.table(0)
    # A twentieth more a token stays within the interval.
    more = table["flops"] / np.where(table["architecture"] == "prefix_simba", 1.2 / 1.05, 1)
    assert not any(one.changes for one in compared(table.assign(flops=more)).conventions)
    heavy = table.assign(flops=table["flops"] * np.where(table["architecture"] == "prefix_simba", 20, 1))
    (one,) = compared(heavy).conventions
    assert one.changes
    assert one.value < 1 < one.value_under


def test_laws_that_pool_what_they_do_not_know_say_so() -> None:
    def codes(table: pd.DataFrame, law: str) -> set[str]:
        points = checked(table)
        one, _ = fit_all(points.frames, law_named(law), 1e-3)
        return {note.code for note in design_notes(one, points.of(one.architecture))}

    table = WIDE.table(0)
    assert "pooled_sizes" in codes(table, "data")
    assert "pooled_budgets" in codes(table, "size")
    assert "pooled_sizes" not in codes(table[table["n_params"] == SIX_SIZES[0]], "data")
    assert "pooled_budgets" not in codes(table[table["iterations"] == 1600], "size")
