"""tuned.json of a study: the learning rates `ssmscale tune` found, and the power law that carries them to other sizes.

Written once by tuning and read before a Run's identity is computed. Its numbers have three digits, so that the
identities which follow from them can be read, and written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from harness.study.run import Count, Digest, Frozen, Positive
from ssmttm.errors import InputError
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count

DIGITS = 3
"""Digits of a value that is searched or carried: a finer difference moves no loss that could be told from noise."""
Interval = tuple[Positive, Positive]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class TunedSize(Frozen):
    """What was learnt of one architecture at one size."""

    size: str
    n_params: Count
    d_model: Count
    lr: Positive
    """Minimum of a parabola through the losses near the best trial, against log learning rate."""
    ci95: Interval
    """Of that minimum, by resampling trials."""
    n_trials: Count
    """Finished trials it rests on."""
    best: Mapping[str, Any]
    """The searched values of the best trial."""
    best_loss: Finite


class Law(Frozen):
    """log lr = intercept + slope log x, x being what the study scales by."""

    intercept: Finite
    slope: Finite
    slope_ci95: tuple[Finite, Finite]
    covariance: tuple[Finite, Finite, Finite]
    """Of intercept and slope: (var intercept, covariance, var slope)."""

    def at(self, x: float) -> tuple[float, Interval]:
        """The learning rate at x and its 95 % interval, each with three digits."""
        log = math.log(x)
        value = self.intercept + self.slope * log
        a, ab, b = self.covariance
        half = 1.96 * math.sqrt(max(0.0, a + 2 * ab * log + b * log * log))
        low, middle, high = (rounded(math.exp(value + shift)) for shift in (-half, 0.0, half))
        return middle, (low, high)


class Carried(Frozen):
    """The learning rate of a size that was not searched, by the law."""

    size: str
    n_params: Count
    d_model: Count
    lr: Positive
    ci95: Interval


class TunedArchitecture(Frozen):
    """One architecture: its searched sizes, the law through them, and where it leads."""

    sizes: tuple[TunedSize, ...]
    law: Law | None = None
    """Null where fewer than two sizes were searched."""
    carried: tuple[Carried, ...] = ()


class Tuned(Frozen):
    """The file."""

    study: str
    scale_by: Literal["n_params", "d_model"]
    iterations: Count
    """Length of the runs the learning rates are best for."""
    fingerprint: Digest
    """Of the runs it was fitted to and their losses."""
    architectures: Mapping[str, TunedArchitecture]

    def lr(self, model: ModelConfig) -> float | None:
        """The learning rate of a model: as measured where its size was searched, else by the law; None without."""
        found = self.architectures.get(str(model.architecture))
        if found is None:
            return None
        facts = {"n_params": parameter_count(model).n_params, "d_model": model.d_model}
        for size in found.sizes:
            if (size.n_params, size.d_model) == (facts["n_params"], facts["d_model"]):
                return size.lr
        return found.law.at(facts[self.scale_by])[0] if found.law else None


def rounded(value: float) -> float:
    """The number with three digits."""
    return float(f"{value:.{DIGITS}g}")


def tuned_rate(tuned: Tuned | None, model: ModelConfig, where: str) -> float:
    """The learning rate that stands for `tuned`; raises InputError where none was found for such a model."""
    if tuned is None:
        raise InputError(
            f"{where}: lr: tuned: nothing was tuned here yet; `ssmscale tune` does, or give a number"
        )
    rate = tuned.lr(model)
    if rate is None:
        known = ", ".join(
            f"{name} ({', '.join(size.size for size in found.sizes)})"
            for name, found in tuned.architectures.items()
        )
        raise InputError(
            f"{where}: lr: tuned: was tuned for {known}, which does not tell; tune this too, or give a number"
        )
    return rate
