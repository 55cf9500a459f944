"""Text-to-music language models, their codecs and their data; knows nothing of the study engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["MusicLM"]

if TYPE_CHECKING:
    from ssmttm.model.music_lm import MusicLM
else:
    _PLACES = {
        "MusicLM": "ssmttm.model.music_lm:MusicLM",
    }

    def __getattr__(name: str) -> Any:
        """Import a name of `__all__` when it is first used."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _PLACES[name].partition(":")
        return getattr(import_module(module), attribute)
