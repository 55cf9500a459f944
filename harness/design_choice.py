"""The `design` of a study: what is taken for true while its grid is planned. No part of any Run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from harness.run import Frozen
from ssmttm.config import Architecture

LogSd = Annotated[float, Field(ge=0.0, le=1.0)]
"""A standard deviation of log loss: 0.004 is 0.4 per cent of a loss."""


class NoiseChoice(Frozen):
    """How much losses scatter about their law."""

    series: LogSd
    """What the runs of a trunk have in common."""
    run: LogSd
    """What each run has of its own."""


class DesignChoice(Frozen):
    """A prior law by architecture, its parameters as `ssmscale fit` prints them, and the noise."""

    law: str | None = None
    prior: dict[Architecture, dict[str, float]] = {}
    noise: NoiseChoice | None = None
