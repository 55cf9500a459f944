"""Progress of a build, for a listener such as a progress bar or the worker of a part."""

PULSE_SECONDS = 1.0
"""Longest pause between two calls to a listener while other processes work."""


class Progress:
    """A listener to a build; this one ignores all it hears. Any of its methods may raise to stop the build."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a stage of `total` pieces, of which an earlier build finished `done`."""

    def advance(self, seconds: float = 0.0) -> None:
        """Count one piece of the stage as done, which holds so many seconds of audio."""

    def pulse(self) -> None:
        """Hear that the build goes on while no piece ends: within a long track, or while other workers work."""
