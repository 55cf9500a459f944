"""The document: its keys, notes and refusals, and the laws it recovers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.errors import InputError
from analysis.findings.comparison import fit_all
from analysis.findings.document import fit_points
from analysis.findings.notes import correlation, design_notes, exclusion_notes, unidentified_because
from analysis.findings.results import FitDocument
from analysis.fitting.bootstrap import Fitted, cluster_keys
from analysis.fitting.checks import held_out
from analysis.fitting.solver import FitResult, Problem
from analysis.laws.catalogue import law_named
from analysis.points.table import CheckedPoints
from tests.analysis.conftest import checked, fit, fitted, note_codes
from tests.analysis.synthetic import SIMBA, SIX_SIZES, WIDE, SyntheticStudy, loss_by


def test_the_json_has_the_keys_promised_and_only_finite_numbers(document: FitDocument) -> None:
    result = json.loads(json.dumps(document.model_dump(mode="json"), allow_nan=False))
    assert {"law", "huber_delta", "architectures", "comparison"} <= set(result)
    for one in result["architectures"].values():
        assert {"params", "objective", "n_points", "n_runs", "status", "ci95", "heldout", "notes"} <= set(one)
        assert set(one["params"]) == set(one["ci95"]) == {"E", "A", "B", "alpha", "beta"}
        assert all(set(note) == {"code", "text"} for note in one["notes"])
    assert {"reference", "n_convention", "size_ratio", "compute_gain"} <= set(result["comparison"])
    row = result["comparison"]["size_ratio"][0]
    assert {"architecture", "iterations", "reference_n_params", "loss", "ratio", "ci95", "status"} <= set(row)
    assert FitDocument.model_validate(result).model_dump(mode="json") == result


def test_counts_tell_points_runs_and_series_apart(document: FitDocument) -> None:
    one = document.architectures["prefix_simba"]
    assert (one.n_points, one.n_runs, one.n_clusters) == (18, 18, 6)


@pytest.mark.parametrize("law", ["chinchilla", "chinchilla_shared_e"])
def test_laws_are_recovered_from_points_without_noise(law: str) -> None:
    points = checked(SyntheticStudy(cluster_noise=0, row_noise=0).table(0))
    for one in fit_all(points.frames, law_named(law), 1e-3):
        assert one.result.params == pytest.approx(SyntheticStudy().laws[one.architecture], rel=1e-4)


def test_few_series_are_noted_and_named_as_such(document: FitDocument) -> None:
    assert document.resampling.scheme == "mixed"
    # Two budgets remain without the longest.
    assert {"few_clusters", "heldout_underdetermined"} <= note_codes(document)


def test_the_heldout_error_is_that_of_points_the_fit_had_not_seen(
    points: CheckedPoints, document: FitDocument
) -> None:
    heldout = document.architectures["prefix_simba"].heldout
    assert heldout.largest_size is not None
    assert {point.n_params for point in heldout.largest_size.points} == {3e6}
    rest = checked(SyntheticStudy().table(0).query("n_params < 3e6"))
    law = fitted(rest, delta=document.huber_delta).result.params
    for point in heldout.largest_size.points:
        predicted = loss_by(law, point.n_params, point.tokens)
        assert point.predicted == pytest.approx(predicted, rel=1e-6)
        assert point.relative_error == pytest.approx(predicted / point.loss - 1, abs=1e-9)
    assert heldout.longest_budget is not None
    assert {point.iterations for point in heldout.longest_budget.points} == {1600}
    assert heldout.largest_size.rms_relative_error > heldout.in_sample_rms


@pytest.mark.parametrize(
    ("study", "codes"),
    [
        (SyntheticStudy(sizes=(1e5, 1e6), seeds=(3, 1)), {"too_few_sizes", "flat_profile"}),
        (SyntheticStudy(iterations=(400, 800)), {"too_few_budgets"}),
        (SyntheticStudy(laws={"prefix_simba": SIMBA | {"A": -1.0}}), {"bound_hit", "resamples_at_bound"}),
        (
            SyntheticStudy(sizes=SIX_SIZES[:5], iterations=(400,), seeds=(1,) * 5),
            {"too_few_points", "no_seed_replicates"},
        ),
        (
            SyntheticStudy({"prefix_simba": SIMBA | {"E": 0.0}}, cluster_noise=0, row_noise=0),
            {"e_out_of_range"},
        ),
    ],
)
def test_what_can_mislead_is_noted(study: SyntheticStudy, codes: set[str]) -> None:
    assert codes <= note_codes(fit(study))


def test_good_points_carry_no_warning() -> None:
    sizes = tuple(np.geomspace(1e5, 1e7, 8))
    document = fit(replace(WIDE, sizes=sizes, seeds=(2,) * 8, cluster_noise=0.001))
    assert [note.code for one in document.architectures.values() for note in one.notes] == []


def test_unannealed_points_are_counted_in_a_note() -> None:
    table = SyntheticStudy().table(0)
    table.loc[[0, 1], "annealed"] = False
    (note,) = exclusion_notes(checked(table).exclusions)
    assert note.code == "unannealed_points"
    assert "2 rows" in note.text


def test_architectures_of_different_grids_are_noted_as_unpaired() -> None:
    table = SyntheticStudy().table(0)
    document = fit(table[table["cluster"] != "prefix_simba-100000-2"])
    assert not document.comparison.paired
    assert "unpaired_resamples" in note_codes(document)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"law": "nothing"}, "--law nothing"),
        ({"delta": 0.0}, "--delta 0"),
        ({"delta": float("nan")}, "--delta nan"),
        ({"resamples": 10}, "10 resamples"),
    ],
)
def test_bad_options_are_refused(points: CheckedPoints, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit_points(points, **options)


def test_architectures_fitted_with_one_e_share_it_in_the_estimate_and_in_every_resample() -> None:
    study = SyntheticStudy(cluster_noise=0.001, row_noise=0.001)
    document = fit(study, law="chinchilla_shared_e")
    one, other = document.architectures.values()
    assert one.params["E"] == other.params["E"]
    assert one.ci95["E"] == other.ci95["E"]
    assert one.params["A"] != other.params["A"]
    np.testing.assert_array_equal(*(document.draws(name)[:, 0] for name in document.architectures))
    assert {one.status, other.status} == {"converged"}
    alone = sum(fitted(checked(study.table(0)), name).result.objective for name in study.laws)
    assert one.objective + other.objective >= alone * (1 - 1e-9)


def test_a_learning_curve_is_found_in_iterations() -> None:
    table = SyntheticStudy(iterations=(100, 200, 400, 800, 1600)).table(0)
    table = table[(table["n_params"] == 1e6)].assign(loss=lambda t: 2.0 + 40.0 / t["iterations"] ** 0.5)
    params = fit(table, law="learning_curve").architectures["prefix_simba"].params
    assert params == pytest.approx({"E": 2.0, "B": 40.0, "beta": 0.5}, rel=1e-4)


REPEATED = {"E": 1.8, "A": 200.0, "B": 900.0, "alpha": 0.33, "beta": 0.36, "R_D": 12.0, "R_N": 4.0}


def repeated() -> pd.DataFrame:
    """Points of a law of repeated data, without noise."""
    form = law_named("data_constrained")
    rows = [
        (n, unique * times, unique)
        for n in np.geomspace(1e6, 3e8, 6)
        for unique in (1e7, 1e8)
        for times in (1, 4, 16, 64)
    ]
    loss = form.predict(np.array([[REPEATED[name] for name in form.names]]), np.log(rows))[0]
    table = pd.DataFrame(rows, columns=["n_params", "tokens", "unique_tokens"])
    return table.assign(architecture="cross_transformer", loss=loss)


def test_the_law_of_repeated_data_is_recovered_with_all_its_parameters() -> None:
    (one,) = fit_all(checked(repeated()).frames, law_named("data_constrained"), 1e-3)
    assert one.result.params == pytest.approx(REPEATED, rel=1e-3)


def test_unique_tokens_that_are_the_same_throughout_are_no_lack_of_budgets() -> None:
    law, points = law_named("data_constrained"), checked(repeated().query("unique_tokens == 1e7"))
    (one,) = fit_all(points.frames, law, 1e-3)
    assert "too_few_budgets" not in {note.code for note in design_notes(one, points.frame)}
    split = held_out(law, law.x(points.frame), points.frame["loss"].to_numpy(), 1e-3, 0)
    assert split is not None
    assert split.determined


def test_sizes_trained_longer_the_larger_they_are_are_collinear_under_a_law_of_three_inputs() -> None:
    sizes = np.geomspace(1e6, 1e8, 8)
    x = np.stack([sizes, 20 * sizes, np.full(8, 1e7)], axis=1)
    problem = Problem.of(law_named("data_constrained"), x, 3 + sizes**-0.1, 1e-3)
    result = FitResult(np.ones(7), {}, 0.0, "converged", (), np.ones((1, 7)))
    cluster, keys = cluster_keys(sizes, np.full(8, np.nan), [str(size) for size in sizes])
    one = Fitted("cross_transformer", problem, result, cluster, keys, sizes)
    assert correlation(one) == pytest.approx(1.0)
    assert "vary together" in unidentified_because(one)


def test_a_law_without_an_input_has_no_split_of_it_to_leave_out() -> None:
    table = SyntheticStudy().table(0)
    for law, rows in (("data", table["n_params"] == 1e5), ("size", table["iterations"] == 400)):
        document = fit(table[rows], law=law)
        heldout = document.architectures["prefix_simba"].heldout
        assert "no_heldout" not in note_codes(document)
        assert (heldout.largest_size is None, heldout.longest_budget is None) == (
            law == "data",
            law == "size",
        )
