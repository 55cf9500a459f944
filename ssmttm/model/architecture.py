"""Backbones as compositions of layers, by name; free of torch."""

from __future__ import annotations

from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import PydanticKnownError, core_schema

from ssmttm.model.layers import facts  # noqa: F401  # registers the layers of this package
from ssmttm.model.layers.layer import LAYERS, Layer

ARCHITECTURES: dict[Architecture, tuple[str, ...]] = {}
"""The sub-layers of one block of every architecture, in order."""


class Architecture(str):
    """The name of a registered backbone; ValueError for any other.

    Prefix models read the text in front of the music, cross models attend to it.
    """

    __slots__ = ()

    def __new__(cls, name: str) -> Architecture:
        """Look the name up."""
        if name not in ARCHITECTURES:
            raise ValueError(f"{name!r} is not one of the architectures {', '.join(ARCHITECTURES)}")
        return super().__new__(cls, name)

    @property
    def sub_layers(self) -> tuple[str, ...]:
        """The names of the sub-layers of one block, in order."""
        return ARCHITECTURES[self]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The facts of the sub-layers of one block, in order."""
        return tuple(LAYERS[name] for name in self.sub_layers)

    @property
    def has_prefix(self) -> bool:
        """True if the text stands in front of the music in one sequence."""
        return not any(layer.attends_to_text for layer in self.layers)

    @property
    def is_recurrent(self) -> bool:
        """True if blocks carry a state along the sequence."""
        return any(layer.is_recurrent for layer in self.layers)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, _source: Any, _handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Validate a string against the names that are registered at the time."""
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def _validated(cls, value: object) -> Architecture:
        if isinstance(value, str) and value in ARCHITECTURES:
            return cls(value)
        *others, last = (repr(name) for name in ARCHITECTURES)
        raise PydanticKnownError("enum", {"expected": f"{', '.join(others)} or {last}"})


def register_architecture(name: str, *sub_layers: str) -> Architecture:
    """Register a backbone under a name; raises ValueError if the name is taken or a layer unknown."""
    if name in ARCHITECTURES:
        raise ValueError(f"an architecture {name!r} exists already")
    unknown = [layer for layer in sub_layers if layer not in LAYERS]
    if unknown or not sub_layers:
        raise ValueError(
            f"{name}: unknown layer {', '.join(unknown) or '(none given)'}; known: {', '.join(LAYERS)}"
        )
    architecture = str.__new__(Architecture, name)
    ARCHITECTURES[architecture] = sub_layers
    return architecture


register_architecture("prefix_mamba", "mamba2")
register_architecture("prefix_simba", "mamba2", "feed_forward")
register_architecture("cross_simba", "mamba2", "cross_attention", "feed_forward")
register_architecture("cross_transformer", "self_attention", "cross_attention", "feed_forward")
