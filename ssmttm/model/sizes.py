"""From how large a model should be to its blocks and its width.

Two of four numbers decide a size: blocks, width, parameters and the aspect (width over blocks). Parameters are met as
near as whole blocks and whole heads allow, for each architecture by itself, so that architectures compared at "the same
size" have nearly the same number of parameters rather than the same number of blocks. What comes out is a plain
ModelConfig: how a size was asked for is no part of the model.
"""

from __future__ import annotations

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
"""How far the nearest model may be from the parameters asked for: a block more or less of six is a twelfth."""
UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Sizing:
    """How large a model should be, beside what its configuration says."""

    n_params: float | None = None
    """Trainable parameters, text encoder and null condition not counted, as in `ParameterCount.n_params`."""
    aspect: float | None = None
    """d_model over n_blocks."""
    tolerance: float = TOLERANCE
    """Largest |n_params / asked - 1|."""


def sized_model(fields: Mapping[str, Any], sizing: Sizing, step: int) -> ModelConfig:
    """The model of `fields`, which hold no more than one of n_blocks and d_model unless `sizing` asks for nothing.

    Widths that are found are multiples of `step`, and a depth is at least one block. Raises InputError where other than
    two of SIZE_KEYS are given or where no model is within the tolerance, naming the nearest; ValidationError
    where the fields make no model.
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
        if width is not None:
            return _of(seed, max(1, round(width / aspect)), width)
        assert blocks is not None
        return _of(seed, blocks, step * max(1, round(blocks * aspect / step)))
    found = list(_candidates(seed, n_params, blocks, width, aspect, step))
    near = [model for model in found if abs(deviation(model, n_params)) <= sizing.tolerance]
    if not near:
        _refuse(min(found, key=lambda model: abs(deviation(model, n_params))), n_params, sizing.tolerance)
    return min(near, key=lambda model: _distance(model, n_params, aspect))


def width_step(fields: Mapping[str, Any]) -> int:
    """The least width that whole heads of every layer divide, whichever of them an architecture has.

    So all architectures of a study get the same widths.
    """
    config = LayerConfig.model_construct(**{key: value for key, value in fields.items() if value})
    return math.lcm(2, *(layer.width_step(config) for layer in LAYERS.values()))


def deviation(model: ModelConfig, n_params: float) -> float:
    """How many times too many parameters a model has, less one."""
    return parameter_count(model).n_params / n_params - 1


def short_count(count: float) -> str:
    """A count of parameters as part of a name: 72M, 1.5B."""
    for limit, unit in UNITS:
        if count >= limit:
            return f"{count / limit:.4g}{unit}"
    return f"{count:.4g}"


def _check_two(given: Mapping[str, float]) -> None:
    if len(given) == 2:
        return
    key, value = next(iter(given.items()))
    others = ", ".join(other for other in SIZE_KEYS if other != key)
    if len(given) < 2:
        raise InputError(f"{key}: {value:,.10g}: is half of a size; add one of {others}")
    said = ", ".join(f"{name} {given[name]:,.10g}" for name in SIZE_KEYS if name in given)
    raise InputError(
        f"{key}: {value:,.10g}: two of {', '.join(SIZE_KEYS)} decide a size, and here are {said}; null takes one back"
    )


def _of(seed: ModelConfig, blocks: int, width: int) -> ModelConfig:
    """The model with those blocks and that width, checked."""
    return ModelConfig(**{**dict(seed), "n_blocks": blocks, "d_model": width})


def _candidates(
    seed: ModelConfig, n_params: float, blocks: int | None, width: int | None, aspect: float | None, step: int
) -> Iterator[ModelConfig]:
    """The models near the target, one for each width that comes into question."""

    def sized(steps: int) -> ModelConfig:
        """Of so many steps in width; as deep as the aspect says where the depth is free."""
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
    """Blocks of the model's width that come nearest to the target: every block has as many parameters."""
    count = parameter_count(model)
    a_block = count.backbone // model.n_blocks
    return max(1, round((n_params - count.n_params + count.backbone) / a_block))


def _distance(model: ModelConfig, n_params: float, aspect: float | None) -> float:
    """What a model misses of the parameters and of the aspect asked for, in relative terms."""
    off = abs(math.log1p(deviation(model, n_params)))
    return off + (abs(math.log(model.d_model / model.n_blocks / aspect)) if aspect else 0.0)


def _refuse(nearest: ModelConfig, n_params: float, tolerance: float) -> None:
    count, blocks = parameter_count(nearest).n_params, nearest.n_blocks
    raise InputError(
        f"n_params: {n_params:,.10g}: the nearest {nearest.architecture} has {count:,} "
        f"({blocks} {'block' if blocks == 1 else 'blocks'}, d_model {nearest.d_model}), {count / n_params - 1:+.1%} "
        f"where the tolerance is {tolerance:.3g}; ask for that many, let aspect find the width, or raise the tolerance"
    )
