"""The variance that a grid gives the size ratio, in closed form: it tells thousands of grids apart in seconds.

Huber's estimator far within its noise is nearly the least absolute one, whose sandwich has the covariance of the
clipped noise as its meat. Within a series that is the arcsine of the losses' correlation. What a cluster pulls the fit
towards itself is put back as the bootstrap puts it back (CR3, Bell and McCaffrey 2002), so that a grid that hangs on
one series is not taken for a good one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis import compare
from analysis.law import Array
from analysis.prior import Noise, Prior

LEVERAGE = (
    0.9  # of a series' pull on the fit that is put back: all of it would explode where one alone decides
)
STEP = 1e-4
NEARLY_NOTHING = 1e-12


@dataclass(frozen=True)
class Sensitivity:
    """How log losses of one set of iteration counts follow the parameters of all architectures, and how the ratio does.

    `slopes` is (cells, counts, parameters), a cell being an architecture's size; `targets` has a row a ratio. `size`
    is the index of each cell's size.
    """

    slopes: Array
    targets: Array
    size: Array
    noise: Noise

    def variance(self, seeds: Array) -> Array:
        """Summed variance of the logarithms of the ratios (grids) for grids of `seeds` (grids, sizes)."""
        weight = seeds[:, self.size]
        cells, count, width = self.slopes.shape
        gram = self.slopes.transpose(0, 2, 1) @ self.slopes
        bread = (weight @ gram.reshape(cells, -1)).reshape(-1, width, width)
        scale = np.sqrt(np.maximum(np.einsum("gpp->gp", bread), 1e-300))
        scale = scale[:, :, None] * scale[:, None, :]
        # What no seed speaks of has a variance without bounds, and this much is as good.
        inverse = np.linalg.inv(bread / scale + NEARLY_NOTHING * np.eye(width)) / scale
        toward = self.slopes[None] @ inverse[:, None]
        hat = toward @ self.slopes.transpose(0, 2, 1)[None]
        pull = toward @ self.targets.T
        loose = np.linalg.solve(np.eye(count) - LEVERAGE * hat, pull)
        shared, own = _clipped(self.noise)
        meat = own * np.eye(count) + shared
        each = (pull * (meat @ loose)).sum(axis=(2, 3))
        out: Array = (weight * each).sum(axis=1)
        return np.where(np.isfinite(out) & (out > 0), out, np.inf)


def sensitivity(
    prior: Prior,
    sizes: Mapping[str, Sequence[float]],
    inputs: Mapping[str, Array],
    truth: Sequence[compare.Equal],
    reference: str,
) -> Sensitivity:
    """From the candidate sizes of each architecture and the law's data input at each count (counts)."""
    names = sorted(sizes)
    law = prior.law
    width = len(law.names)
    shared = [law.names.index(name) for name in law.shared]
    logs = {
        name: np.array([[[np.log(n), np.log(d)] for d in inputs[name]] for n in sizes[name]])
        for name in names
    }
    centre = np.concatenate([cells.reshape(-1, 2) for cells in logs.values()]).mean(axis=0)
    u = {name: law.to_solver(prior.row(name), centre) for name in names}

    def spread(values: Array, part: int) -> Array:
        """Derivatives by an architecture's own parameters among those of all."""
        out = np.zeros((*values.shape[:-1], width * len(names)))
        for j in range(width):
            out[..., (0 if j in shared else part) * width + j] = values[..., j]
        return out

    slopes, size = [], []
    for part, name in enumerate(names):
        cells = logs[name]
        loss, jacobian = law.predict_with_jacobian(u[name], (cells - centre).reshape(-1, 2))
        relative = (jacobian[0] / loss[0][:, None]).reshape(*cells.shape[:2], width)
        slopes.append(spread(relative, part))
        size += list(range(len(cells)))
    targets = []
    for row in truth:
        if row.n_params is None:
            continue
        at = {
            row.architecture: np.log([row.n_params, inputs[row.architecture].max()]) - centre,
            reference: np.log([row.reference_n_params, inputs[reference].max()]) - centre,
        }
        gradient = {name: law.predict_with_jacobian(u[name], z[None])[1][0, 0] for name, z in at.items()}
        z = at[row.architecture]
        aside = np.array([STEP, 0.0])
        ends = law.predict(u[row.architecture], np.stack([z + aside, z - aside]))[0]
        fall = (ends[0] - ends[1]) / (2 * STEP)
        targets.append(
            (
                spread(gradient[row.architecture], names.index(row.architecture))
                - spread(gradient[reference], names.index(reference))
            )
            / fall
        )
    return Sensitivity(*_used(np.concatenate(slopes), np.array(targets)), np.array(size), prior.noise)


def _used(slopes: Array, targets: Array) -> tuple[Array, Array]:
    """Without the places of parameters that are shared and so counted once."""
    used = np.abs(slopes).max(axis=(0, 1)) > 0
    return slopes[:, :, used], targets[:, used]


def _clipped(noise: Noise) -> tuple[float, float]:
    """Covariance within a series and the rest of a run's variance, of least absolute deviations."""
    total = noise.total**2 * np.pi / 2  # so many times the variance of least squares
    shared = total * 2 / np.pi * float(np.arcsin(noise.series**2 / max(noise.total**2, 1e-300)))
    return shared, total - shared
