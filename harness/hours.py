"""GPU-hours of a study: used, from what really ran, and left, from how fast its runs go.

What is used counts every attempt, and a Series once however many Runs share its trunk. A scheduler's accounts say
how long a job held its devices; without them the journals do, from an attempt's first event to its last. What is left
follows the newest measured speed of the Series, else of others of its architecture and size, and is not known before
either has any. A device is a GPU, or a CPU rank where there are no GPUs, as in a plan; of one that several Series share
each is charged its share, wherever it was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from harness.dispatch.slurm_book import Book
from harness.grid import GridPoint
from harness.journal import Progress, Span
from harness.run import Run
from harness.training.schedule import branch_step


@dataclass(frozen=True)
class JobTime:
    """What a scheduler's accounts say of one job."""

    series_id: str
    device_seconds: float


@dataclass(frozen=True)
class Hours:
    """GPU-hours of a study."""

    used: Mapping[str, float]
    """By series id."""
    left: Mapping[str, float | None]
    """By run id, for what it adds to its Series; 0 where it is over, None where no speed is known."""

    @property
    def used_in_all(self) -> float:
        """Of all Series."""
        return sum(self.used.values())

    @property
    def left_as_far_as_known(self) -> float:
        """Of the Runs whose speed is known."""
        return sum(hours for hours in self.left.values() if hours is not None)

    @property
    def unknown(self) -> int:
        """Runs for which nothing can be said yet."""
        return sum(hours is None for hours in self.left.values())

    def as_json(self) -> dict[str, object]:
        """The `gpu_hours` of `ssmscale status --json`."""
        return {
            "used": self.used_in_all,
            "left": self.left_as_far_as_known,
            "left_unknown_runs": self.unknown,
            "used_by_series": dict(self.used),
        }


def times_of_jobs(book: Book) -> dict[str, JobTime]:
    """By job id, the time of every job that accounting has; nothing without accounting.

    Of a packed array the journals know better: what its job holds is divided among all its Series.
    """
    return {
        view.job_id: JobTime(task.series_id, view.accounted_seconds * array.shape.ranks)
        for array, _, task, view in book.elements()
        if view is not None and view.accounted_seconds is not None and not array.packed
    }


def count_hours(
    points: Sequence[GridPoint],
    trunks: Mapping[str, Progress],
    runs: Mapping[str, Progress],
    wanted: Iterable[str],
    jobs: Mapping[str, JobTime],
) -> Hours:
    """Hours of a study from its journals, by series id and by run id; `wanted` are the Runs that are not over.

    jobs: what accounts say, by job id.
    """
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
    """Device-seconds of attempts; a branch trained within its trunk's attempt is counted once."""
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
    members: dict[str, list[GridPoint]] = {}
    for point in points:
        members.setdefault(point.series_id, []).append(point)
    for series_id, group in members.items():
        rate = _seconds_a_token([trunks[series_id], *(runs[point.run_id] for point in group)])
        if rate is not None:
            rates[series_id] = rate
            by_size.setdefault((group[0].architecture, group[0].size), []).append(rate)
    alike = {size: median(found) for size, found in by_size.items()}
    left: dict[str, float | None] = {}
    for series_id, group in members.items():
        reached = trunks[series_id].step
        for point in sorted(group, key=lambda point: point.run.iterations):
            if point.run_id not in wanted:
                left[point.run_id] = 0.0
                continue
            branch = branch_step(point.run.schedule, point.run.iterations)
            steps = max(0, branch - reached) + point.run.iterations - max(branch, runs[point.run_id].step)
            reached = max(reached, branch)
            rate = rates.get(series_id, alike.get((point.architecture, point.size)))
            left[point.run_id] = None if rate is None else steps * tokens_a_step(point.run) * rate / 3600
    return left


def tokens_a_step(run: Run) -> int:
    """Tokens of one optimiser step."""
    return run.batch * run.frames * run.model.n_codebooks


def _seconds_a_token(journals: Iterable[Progress]) -> float | None:
    """Device-seconds a token by the newest step that was timed, or None."""
    found = None
    for journal in journals:
        for step in journal.steps.values():
            if step.get("tokens_per_second", 0) > 0 and (found is None or step["t"] > found[0]):
                began = journal.started or {}
                devices = began.get("layout", {}).get("ranks", 1) * began.get("gpu_share", 1.0)
                found = step["t"], devices / step["tokens_per_second"]
    return None if found is None else found[1]
