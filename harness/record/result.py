"""The result of a finished Run: its loss and everything else that a scaling law needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field

from harness.study.run import Frozen, Run, WholeNumber, is_annealed
from ssmttm.model.flops import parameter_count

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Result(Frozen):
    """The `finished` event of a Run's journal."""

    loss: Finite
    """Mean held-out cross-entropy over all codebooks in nats a token, without label smoothing."""
    loss_codebooks: tuple[Finite, ...]
    step: WholeNumber
    """Optimiser steps: the Run's iterations."""
    tokens: WholeNumber
    """Targets trained on, with repeats, without padding and prefix."""
    flops: Finite
    """Training FLOPs of the model, without the text encoder."""
    n_params: WholeNumber
    n_params_non_embedding: WholeNumber
    n_params_text_encoder: WholeNumber
    n_params_null_condition: WholeNumber
    annealed: Annotated[bool, Field(strict=True)]

    @classmethod
    def of_event(cls, event: Mapping[str, Any]) -> Self:
        """Read the result from a journal's `finished` event; raises pydantic's ValidationError."""
        return cls.model_validate({name: event[name] for name in cls.model_fields if name in event})


def describe_result(run: Run, tokens: int, flops_per_token: float) -> dict[str, object]:
    """Return the fields of a Result that follow from the Run and its tokens."""
    count = parameter_count(run.model)
    return {
        "flops": flops_per_token * tokens,
        "n_params": count.n_params,
        "n_params_non_embedding": count.non_embedding,
        "n_params_text_encoder": count.text_encoder,
        "n_params_null_condition": count.null_condition,
        "annealed": is_annealed(run.schedule),
    }
