"""The prior of a design: a law for each architecture that is assumed before training, and the noise of its losses.

A former fit is the best prior. Without one the law has the shape of the demo study's fit, moved to the study's own
grid: at the grid's geometric centre, the size term and the data term are as large as in the demo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ValidationError

from analysis.errors import InputError
from analysis.findings.curve import DEFAULT_REFERENCE
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array, Law
from analysis.points.checks import SeedNoise, pooled_sd
from analysis.points.files import MAX_JSON_BYTES, read_whole

if TYPE_CHECKING:
    import pandas as pd

# Fit of the cross_transformer of the demo study (sweeps/demo.yaml): its terms at the geometric centre of its grid, in
# nats, and its exponents.
DEMO_SHAPE = {"E": 1.43, "size": 0.23, "data": 0.55, "alpha": 0.73, "beta": 0.63}
CLAIMED_RATIO = 4.0
"""Size ratio of state-space models at equal loss that arXiv 2601.14786 reports."""


@dataclass(frozen=True)
class Noise:
    """Standard deviations of log loss: `series`, shared by the runs of a trunk, and `run`, of each run alone.

    The defaults are those between seeds of the demo, 0.5 per cent in total.
    """

    series: float = 0.003
    run: float = 0.004

    @property
    def total(self) -> float:
        """Standard deviation of one run's log loss."""
        return float(np.hypot(self.series, self.run))


@dataclass(frozen=True)
class Prior:
    """The parameters of a law by architecture, in its own units, the noise, and a description of their source."""

    law: Law
    params: Mapping[str, Mapping[str, float]]
    noise: Noise
    source: str
    assumed: bool = False

    def row(self, architecture: str) -> Array:
        """Return an architecture's parameters (1, parameters); raises InputError if the prior has none."""
        if architecture not in self.params:
            raise InputError(
                f"{self.source}: has no law for {architecture}; it has {', '.join(sorted(self.params)) or 'none'} and "
                "needs one for every architecture of the grid."
            )
        return np.array([[self.params[architecture][name] for name in self.law.names]])

    def losses(self, frame: pd.DataFrame) -> Array:
        """Return the loss in nats of every row, without noise."""
        out = np.empty(len(frame))
        for name in sorted(set(frame["architecture"])):
            own = (frame["architecture"] == name).to_numpy()
            z = np.log(self.law.x(frame.loc[own]))
            out[own] = self.law.predict(self.row(name), z)[0]
        return out


def choose_prior(
    frame: pd.DataFrame, fit: Path | None, stated: Mapping[str, Any], law: str | None, where: str
) -> Prior:
    """Return the prior of a former fit, else the one that the study's `design` states, else the assumed one.

    `design` has the keys law, prior and noise; its noise replaces that of any prior. Raises InputError as the three
    kinds of prior do.
    """
    named = law or stated.get("law")
    noise = Noise(**stated["noise"]) if stated.get("noise") else None
    if fit is not None:
        return fitted_prior(fit, design_law(named) if named else None, noise)
    form = design_law(named or "chinchilla")
    if stated.get("prior"):
        source = f"{where}: design.prior"
        for architecture, params in stated["prior"].items():
            _check(params, form, f"{source}.{architecture}")
        return Prior(form, stated["prior"], noise or Noise(), source)
    return assumed_prior(frame, form, noise)


def design_law(name: str) -> Law:
    """Return the law of that name if its inputs are size and data; raises InputError otherwise."""
    law = law_named(name)
    if [one.axis for one in law.inputs] != ["size", "data"]:
        raise InputError(
            f"--law {name}: planning a grid of sizes and iterations needs a law of both; use chinchilla or "
            "chinchilla_iterations, or either with _shared_e."
        )
    return law


def assumed_prior(frame: pd.DataFrame, law: Law, noise: Noise | None = None) -> Prior:
    """Move the demo's shape to the centre of this grid; state-space models reach a loss at a quarter of the size."""
    size, data = (
        float(np.exp(np.log(np.unique(frame[column].to_numpy(dtype=np.float64))).mean()))
        for column in law.columns
    )
    shape = DEMO_SHAPE
    params = {}
    for name in sorted(set(frame["architecture"])):
        smaller = 1.0 if name == DEFAULT_REFERENCE else CLAIMED_RATIO
        params[name] = {
            "E": shape["E"],
            "A": shape["size"] * (size / smaller) ** shape["alpha"],
            "B": shape["data"] * data ** shape["beta"],
            "alpha": shape["alpha"],
            "beta": shape["beta"],
        }
    return Prior(law, params, noise or Noise(), "the demo's shape of law", assumed=True)


def fitted_prior(path: Path, law: Law | None, noise: Noise | None = None) -> Prior:
    """Read law and noise of a former `fit --json` document; raises InputError if the file is no such document.

    The noise is that between seeds or, if larger, the scatter around the fitted law, which includes errors of the law.
    """
    try:
        content = read_whole(path, MAX_JSON_BYTES, "give the output of `ssmscale fit STUDY --json`")
        document = _Fit.model_validate_json(content)
    except FileNotFoundError:
        raise InputError(
            f"--prior {path}: there is no such file; `ssmscale fit STUDY --json` prints one."
        ) from None
    except ValidationError:
        raise InputError(
            f"--prior {path}: is not a fit; give the output of `ssmscale fit STUDY --json`."
        ) from None
    own = design_law(document.law)
    if law is not None and law.name != own.name:
        raise InputError(f"--prior {path}: is a fit of law {own.name}, not of {law.name}; fit that law.")
    for name, fit in document.architectures.items():
        _check(fit.params, own, f"--prior {path}: {name}")
    found = noise or _noise_of(list(document.architectures.values()))
    laws = {name: fit.params for name, fit in document.architectures.items()}
    return Prior(own, laws, found, f"--prior {path}")


# The parts of a fit document that a prior needs; pydantic ignores the others, in which versions differ.
class _HeldOut(BaseModel):
    in_sample_rms: float


class _Architecture(BaseModel):
    params: dict[str, float]
    n_points: int
    heldout: _HeldOut | None = None
    seed_noise: tuple[SeedNoise, ...] = ()


class _Fit(BaseModel):
    law: str
    architectures: dict[str, _Architecture]


def _noise_of(fits: Sequence[_Architecture]) -> Noise:
    relative = [replace(one, sd=one.sd / one.mean) for fit in fits for one in fit.seed_noise]
    usual = Noise()
    seeds = pooled_sd(relative) or usual.total
    series, run = (seeds * part / usual.total for part in (usual.series, usual.run))
    rms = [
        fit.heldout.in_sample_rms * np.sqrt(fit.n_points / max(1, fit.n_points - len(fit.params)))
        for fit in fits
        if fit.heldout is not None
    ]
    about = float(np.sqrt(np.mean(np.square(rms)))) if rms else 0.0
    return Noise(series, max(run, float(np.sqrt(max(0.0, about**2 - series**2)))))


def _check(params: Mapping[str, float], law: Law, where: str) -> None:
    if set(params) != set(law.names):
        raise InputError(f"{where}: has {', '.join(params) or 'nothing'}; it needs {', '.join(law.names)}.")
    for name, value in params.items():
        low, high = dict(zip(law.nonlinear, law.bounds, strict=True)).get(name, (0.0, 1e30))
        if not low <= value <= high:
            raise InputError(f"{where}.{name}: {value:g} is not between {low:g} and {high:g}.")
