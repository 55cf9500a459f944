"""How a build says where it is, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """Listens to a build."""

    def stage(self, name: str, total: int, done: int) -> None:
        """A stage begins, of `total` pieces, `done` of them finished by an earlier build."""
        ...

    def advance(self, pieces: int = 1) -> None:
        """Some pieces of the stage are done."""
        ...


class Silent:
    """Nobody listens."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Say nothing."""

    def advance(self, pieces: int = 1) -> None:
        """Say nothing."""
