"""Progress of a build, for a listener such as a progress bar."""

from typing import Protocol


class Progress(Protocol):
    """A listener to a build."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a stage of `total` pieces, of which an earlier build finished `done`."""

    def advance(self, pieces: int = 1) -> None:
        """Count pieces of the stage as done."""


class Silent:
    """A listener that ignores all it hears."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Ignore the stage."""

    def advance(self, pieces: int = 1) -> None:
        """Ignore the pieces."""
