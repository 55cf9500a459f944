"""Text-to-music language models, their codecs and their data; independent of the study engine."""

from typing import TYPE_CHECKING, Any

__all__ = ["MusicLM"]

if TYPE_CHECKING:
    from ssmttm.model.music_lm import MusicLM
else:

    def __getattr__(name: str) -> Any:
        """Import MusicLM, and torch with it, when it is first used."""
        if name != "MusicLM":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from ssmttm.model.music_lm import MusicLM

        return MusicLM
