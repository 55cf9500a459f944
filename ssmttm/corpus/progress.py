"""Progress of a build, for a listener such as a progress bar."""


class Progress:
    """A listener to a build; this one ignores all it hears."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a stage of `total` pieces, of which an earlier build finished `done`."""

    def advance(self) -> None:
        """Count one piece of the stage as done."""
