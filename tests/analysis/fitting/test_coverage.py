"""A 95 % interval holds the truth in about 95 of 100 studies, and resampling rows instead of series does not.

Simulated studies of two architectures, six sizes, three seeds and five iteration counts under a known law near the
demo's. The noise is of the size seen there: losses of one (size, iterations) differ between seeds by about half a
per cent, of which a run's whole series shares 0.3 and each row has 0.4 of its own (root of the sum of squares).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from analysis.findings.curve import Curve, size_at
from analysis.fitting.bootstrap import interval, resample
from analysis.laws.catalogue import CHINCHILLA
from analysis.laws.law import Array
from tests.analysis.conftest import checked, fitted
from tests.analysis.synthetic import TOKENS_AN_ITERATION, SyntheticStudy

REFERENCE, OTHER = "cross_transformer", "prefix_simba"
B = 70.0 * TOKENS_AN_ITERATION**0.8
LAWS = {
    REFERENCE: {"E": 1.50, "A": 300.0, "B": B, "alpha": 0.6, "beta": 0.8},
    OTHER: {"E": 1.45, "A": 240.0, "B": B, "alpha": 0.6, "beta": 0.8},
}
STUDY = SyntheticStudy(
    laws=LAWS,
    sizes=tuple(np.geomspace(2e4, 6.4e5, 6)),
    iterations=(100, 200, 400, 800, 1600),
    seeds=(3,) * 6,
    cluster_noise=0.003,
    row_noise=0.004,
)
LARGEST, LONGEST = STUDY.sizes[-1], STUDY.iterations[-1] * TOKENS_AN_ITERATION
RESAMPLES = 400


def size_ratio(params: Mapping[str, Array], frames: Mapping[str, pd.DataFrame]) -> Array:
    """How many times smaller the other may be for the loss of the largest reference at the longest budget."""
    curves = {name: Curve(CHINCHILLA, params[name], frames[name]) for name in params}
    return LARGEST / size_at(curves[OTHER], curves[REFERENCE].loss(LARGEST, LONGEST), LONGEST)


def truth() -> dict[str, float]:
    names = CHINCHILLA.names
    params = {name: np.array([[law[part] for part in names]]) for name, law in LAWS.items()}
    frames = {name: pd.DataFrame() for name in LAWS}
    return {"alpha": 0.6, "size_ratio": float(size_ratio(params, frames)[0])}


def intervals(table: pd.DataFrame, seed: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of the reference's alpha and of the size ratio."""
    points = checked(table)
    fits = [fitted(points, name) for name in LAWS]
    params = resample(fits, RESAMPLES, seed).params
    frames = {name: points.of(name) for name in LAWS}
    return {
        "alpha": interval(params[REFERENCE][:, CHINCHILLA.names.index("alpha")]),
        "size_ratio": interval(size_ratio(params, frames)),
    }


@dataclass(frozen=True)
class Coverage:
    """Of some studies, by what was estimated: the share whose interval holds the truth, and the median width."""

    studies: int
    share: dict[str, float]
    width: dict[str, float]

    def is_honest(self) -> bool:
        """Whether each share is between 92 and 98 %, give or take two standard errors where studies are few."""
        slack = 0.0 if self.studies >= 300 else 2 * float(np.sqrt(0.95 * 0.05 / self.studies))
        return all(0.92 - slack <= share <= 0.98 + slack for share in self.share.values())


def coverage(studies: int, *, by_rows: bool) -> Coverage:
    """Fit that many studies and look whether their intervals hold the truth."""
    true = truth()
    found = []
    for seed in range(studies):
        table = STUDY.table(seed)
        found.append(intervals(table.assign(cluster=table["run_id"]) if by_rows else table, seed))
    return Coverage(
        studies,
        {
            name: float(np.mean([one[name][0] <= true[name] <= one[name][1] for one in found]))
            for name in true
        },
        {name: float(np.median([one[name][1] - one[name][0] for one in found])) for name in true},
    )


def test_intervals_cover_the_truth_where_series_are_resampled() -> None:
    found = coverage(40, by_rows=False)
    assert found.is_honest(), found


@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_intervals_cover_the_truth_where_series_are_resampled_and_not_where_rows_are() -> None:
    by_series, by_rows = coverage(300, by_rows=False), coverage(300, by_rows=True)
    print(f"by series {by_series}\nby rows {by_rows}")
    assert by_series.is_honest()
    assert not by_rows.is_honest()
    assert all(by_rows.width[name] < by_series.width[name] for name in by_rows.width)
