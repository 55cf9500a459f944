"""Tuning of a study: the `tune:` key of its YAML and the result, tuned.json.

tuned.json holds the best learning rates and the power law that extrapolates them to other sizes, with three digits, so
that a user can write down the numbers that identify a Run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, field_validator, model_validator

from harness.common.validation import Address
from harness.study.run import Count, Digest, Frozen, Positive, WholeNumber
from ssmttm.errors import InputError
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count

DIGITS = 3
"""Significant digits of a searched value: a finer difference changes no loss by more than noise."""
Interval = tuple[Positive, Positive]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("is not a number")
    return value


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("is not a plain value, such as 0.1 or cosine")  # noqa: TRY004 - pydantic's
    return value


Number = Annotated[Any, AfterValidator(_number)]
"""An int or a float as it was written: two ints bound a range of integers."""


class Dimension(Frozen):
    """The search space of one key: a range or a list of choices."""

    low: Number = None
    high: Number = None
    log: StrictBool = False
    """True if the search is uniform in the logarithm."""
    choices: tuple[Annotated[Any, AfterValidator(_scalar)], ...] | None = None

    @model_validator(mode="after")
    def _is_a_range_or_a_list(self) -> Dimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("has choices and a range; give one of them")
            if len(set(self.choices)) < 2:
                raise ValueError("has fewer than two choices; give at least two")
        elif self.low is None or self.high is None:
            raise ValueError("is not a range; give low and high, or choices")
        elif self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        elif self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} has no logarithm; a log range begins above 0")
        return self


class Tune(Frozen):
    """A search for the best values of some keys, for each architecture and size separately."""

    sizes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Sizes of the grid that are searched; a law extrapolates their results to the other sizes."""
    search: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Search space by dotted key, as --set takes it; `training.` may be omitted."""
    trials: Count = 16
    """Number of trials of each architecture and size, including pruned ones."""
    iterations: Count | None = None
    """Length of a trial's runs; null takes the shortest of the grid."""
    seeds: Annotated[tuple[WholeNumber, ...], Field(min_length=1)] = (0,)
    """Seeds that a trial's loss is averaged over."""
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    pruner: Literal["none", "median", "hyperband"] = "none"
    parallel: Count | None = None
    """Trials trained at once; null takes as many as fit here. On a scheduler null takes eight, or the profile's
    limits.parallel; of each architecture and size four, once the first trials have filled the space."""
    storage: Address | None = None
    """Address of Optuna's database, which several ROOTs may share; null is a file under ROOT."""
    scale_by: Literal["n_params", "d_model"] = "n_params"
    """Quantity that the best learning rate depends on by a power law."""

    @field_validator("seeds", "sizes")
    @classmethod
    def _each_is_named_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError("lists an entry twice")
        return value


class SizeRate(Frozen):
    """The learning rate of a size, by the law unless the size was searched."""

    size: str
    n_params: Count
    d_model: Count
    lr: Positive
    ci95: Interval


class TunedSize(SizeRate):
    """The best learning rate of a searched size, by a parabola in its log; the interval comes from resampled trials."""

    n_trials: Count
    """Number of finished trials."""
    best: Mapping[str, Any]
    """Searched values of the best trial."""
    best_loss: Finite


class RateLaw(Frozen):
    """log lr = intercept + slope log x, where x is the study's `scale_by`."""

    intercept: Finite
    slope: Finite
    slope_ci95: tuple[Finite, Finite]
    covariance: tuple[Finite, Finite, Finite]
    """(var intercept, covariance, var slope)."""

    def at(self, x: float) -> tuple[float, Interval]:
        """Return the learning rate at x and its 95 % interval, each with three digits."""
        log = math.log(x)
        value = self.intercept + self.slope * log
        a, ab, b = self.covariance
        half = 1.96 * math.sqrt(max(0.0, a + 2 * ab * log + b * log * log))
        low, middle, high = (rounded(math.exp(value + shift)) for shift in (-half, 0.0, half))
        return middle, (low, high)


class TunedArchitecture(Frozen):
    """One architecture: its searched sizes, the law fitted to them, and the sizes it extrapolates to."""

    sizes: tuple[TunedSize, ...]
    law: RateLaw | None = None
    """Null if fewer than two sizes were searched."""
    carried: tuple[SizeRate, ...] = ()


class Tuned(Frozen):
    """tuned.json of a study."""

    study: str
    scale_by: Literal["n_params", "d_model"]
    iterations: Count
    """Length of the trials' runs."""
    fingerprint: Digest
    """Digest of the trials' runs and their losses."""
    architectures: Mapping[str, TunedArchitecture]


def tuned_rate(tuned: Tuned | None, model: ModelConfig, where: str) -> float:
    """Return the learning rate of a model: its searched size's, else the law's; raises InputError without either."""
    if tuned is None:
        raise InputError(f"{where}: lr: tuned: the study has not been tuned; tune it first, or give a number")
    facts = {"n_params": parameter_count(model).n_params, "d_model": model.d_model}
    if found := tuned.architectures.get(str(model.architecture)):
        for size in found.sizes:
            if (size.n_params, size.d_model) == (facts["n_params"], facts["d_model"]):
                return size.lr
        if found.law:
            return found.law.at(facts[tuned.scale_by])[0]
    known = ", ".join(
        f"{name} ({', '.join(size.size for size in searched.sizes)})"
        for name, searched in tuned.architectures.items()
    )
    raise InputError(f"{where}: lr: tuned: only {known} was tuned; tune this size too, or give a number")


def rounded(value: float) -> float:
    """Return the number with three significant digits."""
    return float(f"{value:.{DIGITS}g}")
