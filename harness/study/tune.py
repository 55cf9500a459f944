"""Tuning of a study: the `tune:` key, which says what is searched, and tuned.json, which keeps what was found.

tuned.json holds the learning rates `ssmscale tune` found and the power law that carries them to other sizes. It is
written once by tuning and read before a Run's identity is computed. Its numbers have three digits, so that the
identities which follow from them can be read, and written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, field_validator, model_validator

from harness.study.run import Count, Digest, Frozen, Positive, WholeNumber
from ssmttm.errors import InputError
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count

DIGITS = 3
"""Digits of a value that is searched or carried: a finer difference moves no loss that could be told from noise."""
Interval = tuple[Positive, Positive]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _number(value: Any) -> Any:
    """A number as it was written: whether it is a whole one says what kind of range it bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("is not a number")
    return value


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("is not a plain value, such as 0.1 or cosine")  # noqa: TRY004 - pydantic's
    return value


Number = Annotated[Any, AfterValidator(_number)]


class Dimension(Frozen):
    """The search space of one key: a range, or a list of choices."""

    low: Number = None
    high: Number = None
    log: StrictBool = False
    """True if the range is searched evenly in the key's logarithm."""
    choices: tuple[Annotated[Any, AfterValidator(_scalar)], ...] | None = None

    @model_validator(mode="after")
    def _is_a_range_or_a_list(self) -> Dimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("has choices and a range; give one of them")
            if len(set(self.choices)) < 2:
                raise ValueError("has fewer than two choices, which leaves nothing to search")
        elif self.low is None or self.high is None:
            raise ValueError("is no range: give low and high, or choices")
        elif self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        elif self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} has no logarithm; a log range begins above 0")
        return self


class Tune(Frozen):
    """A search for the best values of some keys, done for each architecture and each of the sizes apart."""

    sizes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Sizes of the grid that are searched; what is learnt there is carried to the others."""
    search: Annotated[dict[str, Dimension], Field(min_length=1)]
    """By dotted key, as --set takes it; `training.` may be left out."""
    trials: Count = 16
    """Trials of each architecture and size, those that are pruned included."""
    iterations: Count | None = None
    """Length of a trial's runs; null takes the shortest of the grid."""
    seeds: Annotated[tuple[WholeNumber, ...], Field(min_length=1)] = (0,)
    """A trial's loss is the mean over these."""
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    pruner: Literal["none", "median", "hyperband"] = "none"
    parallel: Count | None = None
    """Trials trained at once; null takes as many as there is room for."""
    storage: str | None = None
    """Address of a database for Optuna's record, which several ROOTs may share; null keeps it in a file under ROOT."""
    scale_by: Literal["n_params", "d_model"] = "n_params"
    """The best learning rate is taken to be a power of this."""

    @field_validator("seeds", "sizes")
    @classmethod
    def _each_is_named_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names something twice")
        return value


class TunedSize(Frozen):
    """The result for one architecture at one size."""

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


class RateLaw(Frozen):
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
    law: RateLaw | None = None
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


def rounded(value: float) -> float:
    """The number with three digits."""
    return float(f"{value:.{DIGITS}g}")
