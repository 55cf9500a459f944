"""The support of a law: the sizes and amounts of data, both together, at which its architecture was trained.

Ranges of the columns say too little. An IsoFLOP campaign has large models and long runs, and never both in one run; a
law read there continues beyond all trained compute. The support is the convex hull of the points in ln N and ln D, as
far as a run lies near. In a hull 6 N D, which is linear in the logarithms, never exceeds the largest of the runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from analysis import text as wording
from analysis.laws.law import Array, Interval

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

SAME = 1.03
"""Sizes, or amounts of data, that differ by no more than this factor count as one."""
NEAR = 4.0
"""Factor in size and in data within which some run must lie: a hull also spans the gap between two separate strips."""
THIN = 1e-6  # thickness of a hull, in log units, below which it is a line


@dataclass(frozen=True)
class Place:
    """A size and an amount of data, seen from the support of an architecture.

    `size` and `data` are factors to the nearest point of the hull, above 1 where that must grow; `size_range` and
    `data_range` are those to the trained range of one column, and `compute` is 6 N D over the largest of the runs.
    `near` is true if a run lies within the factor NEAR.
    """

    n_params: float
    size: float
    data: float
    size_range: float
    data_range: float
    compute: float
    near: bool

    @property
    def in_hull(self) -> bool:
        """True if the place is in the hull, up to the factor SAME in size and data."""
        return max(_factor(self.size), _factor(self.data)) <= SAME

    @property
    def inside(self) -> bool:
        """True if the runs support a value at this place."""
        return self.in_hull and self.near

    def reason(self, size_is: str, arm: str) -> str:
        """Return how far the place lies outside the support, or an empty string.

        `size_is` names the size, such as "the equal size", and `arm` the architecture.
        """
        if self.inside:
            return ""
        if self.in_hull:
            size = wording.human(self.n_params)
            return f"no run of {arm} lies within a factor of {NEAR:g} of {size} parameters and of this budget"
        beyond = []
        if _factor(self.size_range) > SAME:
            side = "below the smallest" if self.size_range > 1 else "above the largest"
            beyond.append(
                f"{size_is} lies {wording.times(_factor(self.size_range))} times {side} trained size of {arm}"
            )
        if _factor(self.data_range) > SAME:
            side = "below the shortest" if self.data_range > 1 else "above the longest"
            beyond.append(f"the budget lies {wording.times(_factor(self.data_range))} times {side} of {arm}")
        if not beyond:
            size = f"{wording.times(_factor(self.size))} times {'larger' if self.size > 1 else 'smaller'}"
            data = f"{wording.times(_factor(self.data))} times {'longer' if self.data > 1 else 'shorter'}"
            near = " and ".join(
                part for part, by in ((size, self.size), (data, self.data)) if _factor(by) > SAME
            )
            beyond.append(
                f"no run of {arm} has both {wording.human(self.n_params)} parameters and this budget, and the nearest "
                f"that its runs enclose is {near}"
            )
        if self.compute > SAME:
            beyond.append(f"that is {wording.times(self.compute)} times the largest trained compute of {arm}")
        return " and ".join(beyond)


@dataclass(frozen=True)
class Support:
    """Sizes and data of an architecture's points: `logs` (points, 2) has ln N and ln D, in order.

    The support of a law without a data input is an interval of sizes: then ln D is 0 everywhere.
    """

    logs: Array
    has_data: bool = True

    @classmethod
    def of(cls, n_params: Array, data: Array | None) -> Support:
        """Return the support of points (points) by their sizes and their amounts of data, if the law reads those."""
        columns = [np.log(n_params), np.zeros(len(n_params)) if data is None else np.log(data)]
        return cls(np.unique(np.stack(columns, axis=1), axis=0), data is not None)

    @cached_property
    def corners(self) -> Array:
        """Corners of the hull in order (corners, 2): two if the points lie on a line, one if they are one."""
        from scipy.spatial import ConvexHull, QhullError

        ends = np.unique(
            self.logs[[0, -1]], axis=0
        )  # the rows are in order, so that these are furthest apart
        if len(self.logs) < 3:
            return ends
        away = np.linalg.svd(self.logs - self.logs.mean(axis=0), full_matrices=False)[2][-1]
        if float(np.ptp(self.logs @ away)) < THIN:
            return ends
        try:
            return np.asarray(self.logs[ConvexHull(self.logs).vertices], dtype=np.float64)
        except QhullError:
            return ends

    @cached_property
    def _tree(self) -> cKDTree:
        from scipy.spatial import cKDTree

        return cKDTree(self.logs)

    def place(self, n_params: float, data: float) -> Place:
        """Return where a size and an amount of data lie; the data are ignored if the law reads none."""
        at = np.array([np.log(n_params), np.log(data) if self.has_data else 0.0])
        size, amount = self._nearest(at) - at
        low, high = self.logs.min(axis=0), self.logs.max(axis=0)
        beyond = np.clip(at, low, high) - at
        far = float(np.asarray(self._tree.query(at, p=np.inf)[0]))
        return Place(
            n_params=n_params,
            size=float(np.exp(size)),
            data=float(np.exp(amount)),
            size_range=float(np.exp(beyond[0])),
            data_range=float(np.exp(beyond[1])),
            compute=float(np.exp(at.sum() - self.logs.sum(axis=1).max())),
            near=bool(far <= np.log(NEAR * SAME)),
        )

    def sizes_at(self, data: float) -> Interval:
        """Return the least and the largest size of the hull at an amount of data, or at the nearest trained one."""
        return self._cut(0, np.log(data) if self.has_data else 0.0)

    def data_at(self, n_params: float) -> Interval:
        """Return the least and the most data of the hull at a size, or at the nearest trained one."""
        return self._cut(1, np.log(n_params))

    def _cut(self, axis: int, level: float) -> Interval:
        """Return the ends along one axis of the hull's cut at a level of the other."""
        across = self.logs[:, 1 - axis]
        level = float(np.clip(level, across.min(), across.max()))
        (a, along_a), (b, along_b) = ((ends[:, 1 - axis], ends[:, axis]) for ends in self._edges())
        crossed = (np.minimum(a, b) <= level) & (level <= np.maximum(a, b))
        share = np.divide(level - a, b - a, out=np.zeros(len(a)), where=a != b)
        cuts = np.concatenate([(along_a + share * (along_b - along_a))[crossed], along_b[crossed & (a == b)]])
        return float(np.exp(cuts.min())), float(np.exp(cuts.max()))

    def _edges(self) -> tuple[Array, Array]:
        return self.corners, np.roll(self.corners, -1, axis=0)

    def _nearest(self, at: Array) -> Array:
        """Return the point of the hull that is nearest in the logarithms."""
        first, second = self._edges()
        along = second - first
        toward = at - first
        if len(first) > 2 and bool((along[:, 0] * toward[:, 1] >= along[:, 1] * toward[:, 0]).all()):
            return at
        length = np.maximum((along**2).sum(axis=1), 1e-300)
        share = np.clip((toward * along).sum(axis=1) / length, 0.0, 1.0)
        on_edge = first + share[:, None] * along
        out: Array = on_edge[int(np.argmin(((on_edge - at) ** 2).sum(axis=1)))]
        return out


def _factor(by: float) -> float:
    """Return a factor or its inverse, whichever is 1 or more."""
    return max(by, 1.0 / by)
