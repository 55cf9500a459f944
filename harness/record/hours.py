"""GPU-hours of a study, used and left, from the journals and a scheduler's accounts.

Hours used count every attempt, and a Series once even if several Runs share its trunk. A scheduler's accounts tell how
long a job held its devices; without them an attempt counts from its first event to its last. Hours left follow the
newest measured speed of the Series, else of others of its architecture and size. A device is a GPU, or a CPU rank where
there are no GPUs; a Series that shares a device is charged its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from harness.record.journal import Progress, Span
from harness.study.grid import GridPoint
from harness.study.run import branch_step, by_series


class JobTime(NamedTuple):
    """A job in a scheduler's accounts."""

    series_id: str
    device_seconds: float


@dataclass(frozen=True)
class Hours:
    """GPU-hours of a study."""

    used: Mapping[str, float]
    """By series id."""
    left: Mapping[str, float | None]
    """Hours that each Run adds to its Series, by run id: 0 if it is over, None if no speed was measured."""
    shared: frozenset[str] = frozenset()
    """Ids of the Series that were trained for another study too: their hours count for each."""

    @property
    def used_in_all(self) -> float:
        """GPU-hours used by all Series."""
        return sum(self.used.values())

    @property
    def used_by_shared(self) -> float:
        """GPU-hours used by Series that were trained for another study too."""
        return sum(self.used[series_id] for series_id in self.shared)

    @property
    def left_as_far_as_known(self) -> float:
        """GPU-hours left of the Runs whose speed is known."""
        return sum(hours for hours in self.left.values() if hours is not None)

    @property
    def unknown(self) -> int:
        """Number of Runs whose speed is not known."""
        return sum(hours is None for hours in self.left.values())

    def as_json(self) -> dict[str, object]:
        """Return the `gpu_hours` of `ssmscale status --json`."""
        return {
            "used": self.used_in_all,
            "used_by_shared_series": self.used_by_shared,
            "left": self.left_as_far_as_known,
            "left_unknown_runs": self.unknown,
            "used_by_series": dict(self.used),
        }


def count_hours(
    points: Sequence[GridPoint],
    trunks: Mapping[str, Progress],
    runs: Mapping[str, Progress],
    wanted: Iterable[str],
    jobs: Mapping[str, JobTime],
) -> Hours:
    """Return the hours; `jobs` of a scheduler's accounts replace their journals, and `wanted` Runs are not over."""
    spans: dict[str, list[Span]] = {series_id: list(trunk.spans) for series_id, trunk in trunks.items()}
    for point in points:
        spans[point.series_id] += runs[point.run_id].spans
    seconds = {
        series_id: _covered(span for span in held if span.job_id not in jobs)
        for series_id, held in spans.items()
    }
    for job in jobs.values():
        if job.series_id in seconds:
            seconds[job.series_id] += job.device_seconds
    used = {series_id: device_seconds / 3600 for series_id, device_seconds in seconds.items()}
    return Hours(used, _left(points, trunks, runs, set(wanted)))


def _covered(spans: Iterable[Span]) -> float:
    """Return the device-seconds of attempts; a branch trained during its trunk's attempt counts once."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: (span.begun, -span.ended)):
        total += max(0.0, span.ended - max(span.begun, until)) * span.ranks * span.gpu_share
        until = max(until, span.ended)
    return total


def _left(
    points: Sequence[GridPoint],
    trunks: Mapping[str, Progress],
    runs: Mapping[str, Progress],
    wanted: set[str],
) -> dict[str, float | None]:
    rates: dict[str, float] = {}
    by_size: dict[tuple[str, str], list[float]] = {}
    members = by_series(points)
    for series_id, group in members.items():
        rate = _seconds_a_token([trunks[series_id], *(runs[point.run_id] for point in group)])
        if rate is not None:
            rates[series_id] = rate
            by_size.setdefault((group[0].architecture, group[0].size), []).append(rate)
    medians = {size: median(found) for size, found in by_size.items()}
    left: dict[str, float | None] = {point.run_id: 0.0 for point in points}
    for series_id, group in members.items():
        reached = trunks[series_id].step
        rate = rates.get(series_id, medians.get((group[0].architecture, group[0].size)))
        for point in sorted(group, key=lambda point: point.run.iterations):
            if point.run_id in wanted:
                branch = branch_step(point.run.schedule, point.run.iterations)
                steps = max(0, branch - reached) + point.run.iterations - max(branch, runs[point.run_id].step)
                reached = max(reached, branch)
                left[point.run_id] = None if rate is None else steps * point.run.tokens_a_step * rate / 3600
    return left


def _seconds_a_token(journals: Iterable[Progress]) -> float | None:
    """Return the device-seconds a token of the newest timed step, or None."""
    timed = [
        (step["t"], step["tokens_per_second"], journal.started or {})
        for journal in journals
        for step in journal.steps.values()
        if step.get("tokens_per_second", 0) > 0
    ]
    if not timed:
        return None
    _, speed, began = max(timed, key=lambda entry: entry[0])
    return float(began.get("layout", {}).get("ranks", 1) * began.get("gpu_share", 1.0) / speed)
