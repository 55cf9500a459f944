"""What a Series is expected to take, corrected by what others have taken.

A plan's predictions err, and they err alike for what is alike: for one architecture most, for all on this machine
somewhat. So the correction is a factor, learned in logarithms, since half and double are errors of one size:

    all   = sum of log(measured / expected) over all Series / (their number + PRIOR)
    of a  = (PRIOR * all + sum over the architecture's Series) / (their number + PRIOR)

With nothing finished the factor is 1. The first Series moves it a half of the way (PRIOR is 1), and further ones count
as much as it: an architecture's own soon outweigh what is known of all. A Series that has gone on for longer than was
expected is expected to go on for a part of what it has taken so far, since it is no better known than that.
"""

from __future__ import annotations

import math
from collections import defaultdict

from harness.dispatch.base import Task

PRIOR = 1.0
"""For how many Series the expectation counts that those of an architecture are like all, and all like the plan."""
MOST = math.log(1000.0)
"""By how much a plan may err, either way: what is further off was not the training that was planned."""
OVERDUE = 0.15
"""Share of the time taken so far that a Series is expected to take still, where it is late. Little depends on it: from
0.02 to 0.5 simulated packings of 24 Series, with estimates off by 0.5 to 2, end within half a percent of each other."""


class Pace:
    """How much slower or faster Series are than their plan says."""

    def __init__(self) -> None:
        self._logs: dict[str, list[float]] = defaultdict(list)

    def finished(self, job: Task, seconds: float) -> None:
        """Learn from a Series that took so many seconds from its first step to its last."""
        if job.seconds > 0 and seconds > 0:
            log = math.log(seconds) - math.log(job.seconds)
            self._logs[job.architecture].append(max(-MOST, min(MOST, log)))

    def expected(self, job: Task) -> float:
        """Seconds a Series should take."""
        return job.seconds * self.factor(job.architecture)

    def left(self, job: Task, elapsed: float) -> float:
        """Seconds a Series should still take that has been training for so many."""
        return max(self.expected(job) - elapsed, OVERDUE * elapsed)

    def factor(self, architecture: str) -> float:
        """By how much the plan's seconds are multiplied."""
        everything = [log for logs in self._logs.values() for log in logs]
        overall = sum(everything) / (len(everything) + PRIOR)
        own = self._logs.get(architecture, [])
        return math.exp((PRIOR * overall + sum(own)) / (len(own) + PRIOR))
