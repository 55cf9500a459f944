"""The `tune:` key of a study: what is searched, at which sizes and for how long."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, field_validator, model_validator

from harness.study.run import Count, Frozen, WholeNumber


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
    """What one key is searched over: a range, or a list of choices."""

    low: Number = None
    high: Number = None
    log: StrictBool = False
    """Whether the range is searched evenly in the key's logarithm."""
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
    """What the best learning rate is taken to be a power of."""

    @field_validator("seeds", "sizes")
    @classmethod
    def _each_is_named_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names something twice")
        return value
