"""What is taken for true before anything is trained: a law for each architecture, and how far losses scatter about it.

A former fit is the best prior. Without one the law has the shape that the demo study's fit had, moved to the study's
own grid: at the grid's geometric centre the size term and the data term take the share of the loss that they took
there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from analysis.errors import InputError
from analysis.findings.curve import DEFAULT_REFERENCE
from analysis.laws.catalogue import law_named
from analysis.laws.law import Array, Law
from analysis.points.checks import SeedNoise, pooled_sd

if TYPE_CHECKING:
    import pandas as pd

# The demo study (sweeps/demo.yaml): its cross_transformer's fit at the geometric centre of its grid, in nats, and the
# exponents of its law.
DEMO_SHAPE = {"E": 1.43, "size": 0.23, "data": 0.55, "alpha": 0.73, "beta": 0.63}
CLAIMED_RATIO = 4.0
"""How many times smaller a state-space model is for the same loss, as arXiv 2601.14786 has it."""


@dataclass(frozen=True)
class Noise:
    """Standard deviations of log loss: `series`, shared by the runs of a trunk, and `run`, each run's own.

    The defaults are those between seeds of the demo, 0.5 per cent in all.
    """

    series: float = 0.003
    run: float = 0.004

    @property
    def total(self) -> float:
        """Of one run's log loss."""
        return float(np.hypot(self.series, self.run))


@dataclass(frozen=True)
class Prior:
    """A law by architecture, in the law's own units and order, the noise, and in words where they come from."""

    law: Law
    params: Mapping[str, Mapping[str, float]]
    noise: Noise
    source: str
    assumed: bool = False

    def row(self, architecture: str) -> Array:
        """An architecture's parameters (1, parameters); raises InputError where the prior has none."""
        if architecture not in self.params:
            raise InputError(
                f"{self.source}: has no law for {architecture}; it has {', '.join(sorted(self.params)) or 'none'}, and "
                "needs one for every architecture of the grid."
            )
        return np.array([[self.params[architecture][name] for name in self.law.names]])

    def losses(self, frame: pd.DataFrame) -> Array:
        """Loss in nats of every row, without noise."""
        out = np.empty(len(frame))
        for name in sorted(set(frame["architecture"])):
            own = (frame["architecture"] == name).to_numpy()
            z = np.log(self.law.x(frame.loc[own]))
            out[own] = self.law.predict(self.row(name), z)[0]
        return out


def choose_prior(
    frame: pd.DataFrame, fit: Path | None, stated: Mapping[str, Any], law: str | None, where: str
) -> Prior:
    """A former fit where one is named, else what the study states (its `design`: law, prior, noise), else assumed.

    The study's noise goes with any of them. Raises InputError as the three kinds of prior do.
    """
    named = law or stated.get("law")
    noise = Noise(**stated["noise"]) if stated.get("noise") else None
    if fit is not None:
        return fitted_prior(fit, design_law(named) if named else None, noise)
    form = design_law(named or "chinchilla")
    if stated.get("prior"):
        laws = {str(name): dict(params) for name, params in stated["prior"].items()}
        return stated_prior(laws, form, noise, f"{where}: design.prior")
    return assumed_prior(frame, form, noise)


def design_law(name: str) -> Law:
    """The law of that name, where it says how loss falls with size and with training; raises InputError otherwise."""
    law = law_named(name)
    if [one.axis for one in law.inputs] != ["size", "data"]:
        raise InputError(
            f"--law {name}: planning a grid of sizes and iterations needs a law of both; take chinchilla or "
            "chinchilla_iterations, or either with _shared_e."
        )
    return law


def assumed_prior(frame: pd.DataFrame, law: Law, noise: Noise | None = None) -> Prior:
    """The demo's shape about the centre of this grid; state-space models reach a loss four times smaller."""
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


def stated_prior(
    laws: Mapping[str, Mapping[str, float]], law: Law, noise: Noise | None, source: str
) -> Prior:
    """A prior as a study states it; raises InputError for a parameter that is missing, unknown or out of range."""
    for architecture, params in laws.items():
        _check(params, law, f"{source}.{architecture}")
    return Prior(law, laws, noise or Noise(), source)


def fitted_prior(path: Path, law: Law | None, noise: Noise | None = None) -> Prior:
    """The law of a former `fit --json` document with its noise; raises InputError where the file is no such thing.

    The scatter is that between seeds or, where larger, that about the fitted law: what the law lacks scatters too.
    """
    try:
        document = _Fit.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"--prior {path}: no such file; `ssmscale fit STUDY --json` prints one.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, ValidationError):
        raise InputError(f"--prior {path}: is not what `ssmscale fit --json` prints.") from None
    own = design_law(document.law)
    if law is not None and law.name != own.name:
        raise InputError(f"--prior {path}: is a fit of law {own.name}, not of {law.name}; fit that law.")
    for name, fit in document.architectures.items():
        _check(fit.params, own, f"--prior {path}: {name}")
    found = noise or _noise_of(list(document.architectures.values()))
    laws = {name: fit.params for name, fit in document.architectures.items()}
    return Prior(own, laws, found, f"--prior {path}")


class _Part(BaseModel):
    """Part of a fit document, whatever else a newer or older one holds."""

    model_config = ConfigDict(extra="ignore")


class _Seeds(_Part):
    seeds: int
    mean: float
    sd: float


class _HeldOut(_Part):
    in_sample_rms: float


class _Architecture(_Part):
    params: dict[str, float]
    n_points: int
    heldout: _HeldOut | None = None
    seed_noise: tuple[_Seeds, ...] = ()


class _Fit(_Part):
    law: str
    architectures: dict[str, _Architecture]


def _noise_of(fits: Sequence[_Architecture]) -> Noise:
    relative = [
        SeedNoise(0.0, 0.0, one.seeds, one.mean, one.sd / one.mean) for fit in fits for one in fit.seed_noise
    ]
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
