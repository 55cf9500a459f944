"""95 % intervals contain the truth in about 95 of 100 studies; those of resampled rows do not.

The studies have two architectures, six sizes, three seeds and five iteration counts, under a known law like the
demo's and with its noise: between seeds the losses differ by about half a per cent, of which 0.3 are shared by a whole
series and 0.4 belong to each row (root of the sum of squares).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from analysis.findings.curve import Curve, size_at
from analysis.fitting.bootstrap import interval, resample
from analysis.laws.catalogue import CHINCHILLA
from analysis.laws.law import Array, Interval
from tests.analysis.conftest import checked, fitted
from tests.analysis.synthetic import TOKENS_AN_ITERATION, WIDE, SyntheticStudy

REFERENCE, OTHER = "cross_transformer", "prefix_simba"
B = 70.0 * TOKENS_AN_ITERATION**0.8
LAWS = {
    REFERENCE: {"E": 1.50, "A": 300.0, "B": B, "alpha": 0.6, "beta": 0.8},
    OTHER: {"E": 1.45, "A": 240.0, "B": B, "alpha": 0.6, "beta": 0.8},
}
SIZES = tuple(np.geomspace(2e4, 6.4e5, 6))
STUDY = SyntheticStudy(
    LAWS, SIZES, (100, 200, 400, 800, 1600), (3,) * 6, cluster_noise=0.003, row_noise=0.004
)
RESAMPLES, FEWER = 400, 200

Shares = dict[str, float]


def size_ratio(
    study: SyntheticStudy, params: Mapping[str, Array], frames: Mapping[str, pd.DataFrame]
) -> Array:
    """Return the size ratio at the loss of the largest reference and the longest budget."""
    largest, longest = study.sizes[-1], study.iterations[-1] * TOKENS_AN_ITERATION
    curves = {name: Curve(CHINCHILLA, params[name], frames[name]) for name in params}
    return largest / size_at(curves[OTHER], curves[REFERENCE].loss(largest, longest), longest)


def truth(study: SyntheticStudy) -> Shares:
    params = {name: np.array([[law[p] for p in CHINCHILLA.names]]) for name, law in study.laws.items()}
    ratio = size_ratio(study, params, dict.fromkeys(study.laws, pd.DataFrame()))
    return {"alpha": study.laws[REFERENCE]["alpha"], "size_ratio": float(ratio[0])}


def intervals(table: pd.DataFrame, study: SyntheticStudy, seed: int, resamples: int) -> dict[str, Interval]:
    """Return the 95 % intervals of the reference's alpha and of the size ratio."""
    points = checked(table)
    params = resample([fitted(points, name) for name in study.laws], resamples, seed).params
    ratio = size_ratio(study, params, {name: points.of(name) for name in study.laws})
    alpha = params[REFERENCE][:, CHINCHILLA.names.index("alpha")]
    return {"alpha": interval(alpha), "size_ratio": interval(ratio)}


def coverage(
    study: SyntheticStudy, trials: int, resamples: int = RESAMPLES, *, by_rows: bool = False
) -> tuple[Shares, Shares]:
    """Fit that many studies; return what share of the intervals holds the truth, and their median width."""
    true = truth(study)
    holds, width = [], []
    for seed in range(trials):
        table = study.table(seed)
        found = intervals(table.assign(cluster=table["run_id"]) if by_rows else table, study, seed, resamples)
        holds.append({name: low <= true[name] <= high for name, (low, high) in found.items()})
        width.append({name: high - low for name, (low, high) in found.items()})
    return dict(pd.DataFrame(holds).mean()), dict(pd.DataFrame(width).median())


def is_honest(share: Shares, trials: int) -> bool:
    """True if each share is between 92 and 98 %, give or take two standard errors where studies are few."""
    slack = 0.0 if trials >= 300 else 2 * float(np.sqrt(0.95 * 0.05 / trials))
    return all(0.92 - slack <= one <= 0.98 + slack for one in share.values())


def test_intervals_cover_the_truth_where_series_are_resampled() -> None:
    share, _ = coverage(STUDY, 16, FEWER)
    assert is_honest(share, 16), share


def test_intervals_of_the_few_series_of_a_demo_cover_the_truth() -> None:
    share, _ = coverage(SyntheticStudy(), 12, FEWER)
    assert min(share.values()) >= 9 / 12


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_intervals_cover_the_truth_where_series_are_resampled_and_not_where_rows_are() -> None:
    (by_series, series_width), (by_rows, rows_width) = (
        coverage(STUDY, 300, by_rows=by_rows) for by_rows in (False, True)
    )
    print(f"by series {by_series} {series_width}\nby rows {by_rows} {rows_width}")
    assert is_honest(by_series, 300)
    assert not is_honest(by_rows, 300)
    assert all(rows_width[name] < series_width[name] for name in rows_width)


@pytest.mark.verify
@pytest.mark.parametrize(
    "study", [SyntheticStudy(), SyntheticStudy(cluster_noise=0.002, row_noise=0.004), WIDE]
)
def test_intervals_of_other_studies_cover_at_close_to_their_nominal_rate(study: SyntheticStudy) -> None:
    share, _ = coverage(study, 120)
    assert min(share.values()) >= 0.85
