"""The results that a plan expects of a grid are those of studies on it; a prior is used as it is given."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from analysis.design.expect import DesignDocument, expected, ratio_notes, ratios_of
from analysis.design.prior import CLAIMED_RATIO, Noise, Prior, assumed_prior, choose_prior, design_law
from analysis.design.simulate import Draws, drawn_losses, middle, simulate
from analysis.errors import InputError
from analysis.findings.document import fit_points
from analysis.findings.results import FitDocument
from analysis.laws.catalogue import law_named
from analysis.points.table import CheckedPoints
from analysis.report.headlines import main_row
from analysis.report.tables import print_design
from tests.analysis.conftest import checked
from tests.analysis.synthetic import TRUE_RATIO, SyntheticStudy

LAW = law_named("chinchilla")
NOISE = Noise(0.003, 0.004)
STUDY = SyntheticStudy(sizes=tuple(np.geomspace(1e5, 3e6, 5)), seeds=(3, 3, 2, 2, 2))
KNOWN = Prior(LAW, STUDY.laws, NOISE, "known")
REFERENCE, OTHER = "cross_transformer", "prefix_simba"


@pytest.fixture(scope="module")
def grid() -> CheckedPoints:
    return checked(STUDY.table(0))


def width(ends: tuple[float, float] | None) -> float:
    assert ends is not None
    return float(np.log(ends[1] / ends[0]))


def seen(grid: CheckedPoints, studies: int, resamples: int) -> tuple[float, float]:
    """Median ends of the size ratio's interval over studies of this grid that are fitted as `ssmscale fit` does."""
    clean = KNOWN.losses(grid.frame)
    found = []
    for number in range(studies):
        losses = drawn_losses(clean, grid.frame["cluster"], NOISE, 500, number)
        document = fit_points(replace(grid, frame=grid.frame.assign(loss=losses)), resamples=resamples)
        row = main_row(document, OTHER)
        assert row is not None
        found.append(row.estimate_ci95 or (0.0, np.inf))
    ends = middle(np.array(found))
    assert ends is not None
    return ends


def test_the_interval_that_is_expected_is_the_one_that_reports_have(grid: CheckedPoints) -> None:
    (ratio,) = expected(grid, KNOWN, draws=Draws(9, 50)).size_ratio
    assert ratio.truth == pytest.approx(TRUE_RATIO, rel=1e-6)
    assert (ratio.identified, ratio.extrapolated, ratio.not_identified) == (1.0, 0.0, 0.0)
    assert width(ratio.ci95) == pytest.approx(width(seen(grid, 3, 100)), rel=0.35)


@pytest.mark.verify
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seeds", [(3, 3, 2, 2, 2), (3, 2, 1, 1, 1)], ids=["whole series", "wild bootstrap"])
def test_expected_and_seen_intervals_agree_within_a_fifth_over_a_hundred_studies(
    seeds: tuple[int, ...],
) -> None:
    grid = checked(replace(STUDY, seeds=seeds).table(0))
    (ratio,) = expected(grid, KNOWN).size_ratio
    real = seen(grid, 100, 1000)
    print(f"expected {ratio.ci95}, coverage {ratio.coverage}; seen {real}")
    assert width(ratio.ci95) == pytest.approx(width(real), rel=0.2)
    assert ratio.coverage is not None
    assert ratio.coverage >= 0.9


def test_twice_the_noise_is_expected_to_widen_every_interval(grid: CheckedPoints) -> None:
    usual, noisy, again = (
        simulate(grid, replace(KNOWN, noise=noise), REFERENCE, Draws(studies, 50)).ratio[OTHER]
        for noise, studies in ((Noise(0.0015, 0.002), 6), (NOISE, 6), (NOISE, 2))
    )
    assert 1.5 < width(middle(noisy)) / width(middle(usual)) < 3
    np.testing.assert_array_equal(again, noisy[:2])


def codes(document: DesignDocument) -> set[str]:
    return {note.code for note in document.notes}


def test_a_grid_that_cannot_identify_the_law_is_noted() -> None:
    together = STUDY.table(0)
    together["tokens"] = 20 * together["n_params"] * (1 + 0.01 * together["iterations"] / 1600)
    two_sizes = replace(STUDY, sizes=(1e5, 3e6), seeds=(3, 3)).table(0)
    one_size = replace(STUDY, sizes=(1e5,), seeds=(6,)).table(0)
    for table, code in (
        (together, "collinear"),
        (two_sizes, "too_few_sizes"),
        (one_size, "not_identified"),
    ):
        document = expected(checked(table), KNOWN, draws=Draws(2, 50))
        assert code in codes(document)
        assert all(ratio.not_identified == 1.0 and ratio.ci95 is None for ratio in document.size_ratio)
    assert document.size_ratio == ()


def test_an_equal_size_outside_the_grid_is_expected_to_be_an_extrapolation() -> None:
    narrow = replace(STUDY, sizes=(1e6, 1.7e6, 3e6), seeds=(3, 3, 3))
    quiet = replace(KNOWN, noise=Noise(1e-5, 1e-5))
    document = expected(checked(narrow.table(0)), quiet, draws=Draws(2, 50))
    assert document.size_ratio[0].extrapolated == 1.0
    (note,) = [note for note in document.notes if note.code == "extrapolated"]
    assert "below the smallest trained size" in note.text


def test_without_a_prior_the_demos_shape_is_moved_to_the_grid_and_printed(grid: CheckedPoints) -> None:
    prior = assumed_prior(grid.frame, LAW)
    document = expected(grid, prior, draws=Draws(2, 50))
    assert "prior_assumed" in codes(document)
    printed = io.StringIO()
    print_design(Console(file=printed, width=200, markup=False), document)
    for word in ("prefix_simba", "alpha", "1,600 iterations", "note prior_assumed"):
        assert word in printed.getvalue()
    assert document.size_ratio[0].truth == pytest.approx(CLAIMED_RATIO, rel=1e-6)
    larger = grid.frame.assign(n_params=grid.frame["n_params"] * 1000)
    np.testing.assert_allclose(assumed_prior(larger, LAW).losses(larger), prior.losses(grid.frame), rtol=1e-9)
    for more in ("coupled", "moving"):
        same = assumed_prior(grid.frame, design_law(more))
        np.testing.assert_allclose(same.losses(grid.frame), prior.losses(grid.frame), rtol=1e-9)


def test_a_former_fit_is_a_prior_with_the_noise_it_saw(document: FitDocument, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(document.model_dump(mode="json")))
    frame = checked(SyntheticStudy().table(0)).frame
    prior = choose_prior(frame, path, {}, None, "study.yaml")
    for name, fit in document.architectures.items():
        assert prior.params[name] == fit.params
    study = SyntheticStudy()
    assert prior.noise.total == pytest.approx(float(np.hypot(study.cluster_noise, study.row_noise)), rel=0.5)
    stated = choose_prior(frame, path, {"noise": {"series": 0.01, "run": 0.02}}, None, "study.yaml")
    assert stated.noise == Noise(0.01, 0.02)
    for law in ("size", "chinchilla_iterations"):
        with pytest.raises(InputError, match="law"):
            choose_prior(frame, path, {}, law, "study.yaml")
    (tmp_path / "other.json").write_text("[]")
    for wrong in ("none.json", "other.json"):
        with pytest.raises(InputError, match=wrong):
            choose_prior(frame, tmp_path / wrong, {}, None, "study.yaml")


def test_a_stated_prior_has_every_parameter_of_every_architecture(grid: CheckedPoints) -> None:
    def stated(**laws: dict[str, float]) -> Prior:
        return choose_prior(grid.frame, None, {"prior": laws}, None, "study.yaml")

    whole = STUDY.laws[OTHER]
    with pytest.raises(InputError, match=r"study\.yaml: design\.prior\.prefix_simba.*needs E, A, B"):
        stated(prefix_simba={"E": 1.0})
    with pytest.raises(InputError, match=r"alpha: 7 is not between"):
        stated(prefix_simba=whole | {"alpha": 7.0})
    with pytest.raises(InputError, match="no law for cross_transformer"):
        expected(grid, stated(prefix_simba=whole))
    with pytest.raises(InputError, match="--reference moon"):
        expected(grid, KNOWN, "moon")


@pytest.mark.parametrize("law", ["size", "data", "learning_curve", "data_constrained"])
def test_a_law_that_lacks_size_or_training_plans_no_grid(law: str) -> None:
    with pytest.raises(InputError, match=f"--law {law}"):
        design_law(law)


def test_intervals_that_often_miss_the_truth_are_noted(grid: CheckedPoints) -> None:
    found = simulate(grid, KNOWN, REFERENCE, Draws(4, 50))
    truth = found.truth[OTHER]
    assert truth.estimate is not None
    shifted = replace(found, truth={OTHER: truth.model_copy(update={"estimate": truth.estimate * 3})})
    (ratio,) = ratios_of(shifted, REFERENCE)
    assert ratio.coverage == 0.0
    assert "undercovered" in {note.code for note in ratio_notes(ratio, shifted)}


def test_a_law_of_another_shape_needs_a_former_fit(grid: CheckedPoints) -> None:
    with pytest.raises(InputError, match=r"--law kaplan: no such law of these runs is known yet"):
        assumed_prior(grid.frame, design_law("kaplan"))
