"""Progress of a build, for a listener such as a progress bar or the worker of a part."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Result = TypeVar("Result")

PULSE_SECONDS = 1.0
"""Longest pause between two calls to a listener while other processes work."""
POLL_SECONDS = 0.2
"""Pause between two looks at what the workers of other builds have done."""


class Progress:
    """A listener to a build; this one ignores all it hears. Any of its methods may raise to stop the build."""

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a stage of `total` pieces, of which an earlier build finished `done`."""

    def advance(self, seconds: float = 0.0) -> None:
        """Count one piece of the stage as done, which holds so many seconds of audio."""

    def pulse(self) -> None:
        """Hear that the build goes on while no piece ends: within a long track, or while other workers work."""


def speed(audio: float, seconds: float) -> str:
    """Say how fast so many seconds of audio were read; empty if there were none."""
    return f"{audio / 3600 / max(seconds, 1e-3):.3g} hours of audio a second" if audio else ""


def pulsing(job: Callable[[], Result], pulse: Callable[[], None]) -> Result:
    """Return the result of a long job, calling `pulse` meanwhile; if that raises, the job is left to its thread."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(job())
        except BaseException as error:  # raised in the caller
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([future], PULSE_SECONDS).done:
        pulse()
    return future.result()
