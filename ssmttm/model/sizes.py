"""Find the blocks and the width of a model from its requested size.

Two of four numbers decide a size: blocks, width, parameters and the aspect (width over blocks). Parameters are matched
as closely as whole blocks and whole heads allow, for each architecture separately, so that architectures compared at
"the same size" have nearly the same number of parameters rather than of blocks. The result is a plain ModelConfig: the
request is no part of the model.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ssmttm.errors import InputError
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count
from ssmttm.model.layers.layer import LAYERS, LayerConfig
from ssmttm.text.config import LIMIT

SIZE_KEYS = ("n_blocks", "d_model", "n_params", "aspect")
"""Two of them decide a size."""
TOLERANCE = 0.1
"""Largest relative distance from the requested parameters: half a block of six is a twelfth."""


@dataclass(frozen=True)
class Sizing:
    """The requested size, beyond the fields of the configuration."""

    n_params: float | None = None
    """Trainable parameters, counted as in `ParameterCount.n_params`."""
    aspect: float | None = None
    """d_model over n_blocks."""
    tolerance: float = TOLERANCE
    """Largest |n_params / requested - 1|."""


def sized_model(fields: Mapping[str, Any], sizing: Sizing, step: int) -> ModelConfig:
    """Return the model of `fields` with the requested size.

    Widths that are found are multiples of `step`, and a depth is at least one block. Raises InputError unless two of
    SIZE_KEYS are given and a model is within the tolerance; ValidationError if the fields make no model.
    """
    n_params, aspect = sizing.n_params, sizing.aspect
    if n_params is None and aspect is None:
        return ModelConfig(**fields)
    given = {"n_params": n_params, "aspect": aspect}
    given |= {key: fields.get(key) for key in ("n_blocks", "d_model")}
    _check_two({key: value for key, value in given.items() if value is not None})
    blocks, width = fields.get("n_blocks"), fields.get("d_model")
    seed = ModelConfig(**{**fields, "n_blocks": blocks or 1, "d_model": width or step})
    if n_params is None:
        assert aspect is not None
        if width is None:
            width = step * max(1, round(seed.n_blocks * aspect / step))
        else:
            blocks = max(1, round(width / aspect))
        return ModelConfig(**{**fields, "n_blocks": blocks, "d_model": width})
    found = list(_candidates(seed, n_params, blocks, width, aspect, step))
    near = [model for model in found if abs(deviation(model, n_params)) <= sizing.tolerance]
    if not near:
        nearest = min(found, key=lambda model: abs(deviation(model, n_params)))
        count, blocks = parameter_count(nearest).n_params, nearest.n_blocks
        raise InputError(
            f"n_params: {n_params:,.10g}: the nearest {nearest.architecture} has {count:,} "
            f"({blocks} {'block' if blocks == 1 else 'blocks'}, d_model {nearest.d_model}), "
            f"{count / n_params - 1:+.1%} where the tolerance is {sizing.tolerance:.3g}; ask for that many, let aspect "
            "find the width, or raise the tolerance"
        )
    return min(near, key=lambda model: _distance(model, n_params, aspect))


def width_step(fields: Mapping[str, Any]) -> int:
    """Return the smallest width that whole heads of every layer divide: all architectures get the same widths."""
    config = LayerConfig.model_construct(**{key: value for key, value in fields.items() if value})
    return math.lcm(2, *(layer.width_step(config) for layer in LAYERS.values()))


def deviation(model: ModelConfig, n_params: float) -> float:
    """Return the relative deviation of a model's parameters from those requested."""
    return parameter_count(model).n_params / n_params - 1


def short_count(count: float) -> str:
    """Return a count of parameters as part of a name: 72M, 1.5B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.4g}{unit}"
    return f"{count:.4g}"


def _check_two(given: Mapping[str, float]) -> None:
    if len(given) == 2:
        return
    key, value = next(iter(given.items()))
    others = ", ".join(other for other in SIZE_KEYS if other != key)
    if len(given) < 2:
        raise InputError(f"{key}: {value:,.10g}: alone does not decide a size; add one of {others}")
    found = ", ".join(f"{name} {given[name]:,.10g}" for name in SIZE_KEYS if name in given)
    raise InputError(
        f"{key}: {value:,.10g}: two of {', '.join(SIZE_KEYS)} decide a size, but {found} are given; set one to null"
    )


def _candidates(
    seed: ModelConfig, n_params: float, blocks: int | None, width: int | None, aspect: float | None, step: int
) -> Iterator[ModelConfig]:
    """Yield the models near the target, one for each plausible width."""

    def sized(steps: int) -> ModelConfig:
        """Return the model of so many steps in width; the aspect decides a free depth."""
        d_model = steps * step
        depth = blocks or max(1, round(d_model / (aspect or d_model)))
        return seed.model_copy(update={"d_model": d_model, "n_blocks": depth})

    if width is not None:
        yield seed.model_copy(update={"n_blocks": _nearest_depth(seed, n_params)})
        return
    steps = range(1, LIMIT // step)
    reached = 1 + bisect_left(steps, n_params, key=lambda k: parameter_count(sized(k)).n_params)
    if blocks is not None:
        yield from (sized(k) for k in (reached - 1, reached) if k > 0)
        return
    for k in range(max(1, reached // 2), 2 * reached + 1, max(1, reached // 256)):
        model = sized(k)
        yield model.model_copy(update={"n_blocks": _nearest_depth(model, n_params)})


def _nearest_depth(model: ModelConfig, n_params: float) -> int:
    """Return the number of blocks of the model's width that comes nearest to the target."""
    count = parameter_count(model)
    a_block = count.backbone // model.n_blocks
    return max(1, round((n_params - count.n_params + count.backbone) / a_block))


def _distance(model: ModelConfig, n_params: float, aspect: float | None) -> float:
    """Return the distance of a model from the requested parameters and aspect, in logarithms."""
    off = abs(math.log1p(deviation(model, n_params)))
    return off + (abs(math.log(model.d_model / model.n_blocks / aspect)) if aspect else 0.0)
