"""Learning rate as a pure function of (step, iterations): no state to save, none to get wrong on resuming.

Under warmup-stable-decay every Run of a Series has the same learning rate up to its branch step, whatever its
length; this is what lets runs share a trunk (Hägele et al. 2024, arXiv 2405.18392). Steps count from 0.
"""

from __future__ import annotations

import math

from harness.study.run import Schedule, ScheduleKind


def decay_steps(schedule: Schedule, iterations: int) -> int:
    """Steps of a Run that are its own and not the trunk's: all of them where no trunk is shared."""
    if schedule.kind is ScheduleKind.WSD:
        return max(1, round(schedule.decay_fraction * iterations))
    return iterations


def branch_step(schedule: Schedule, iterations: int) -> int:
    """Trunk steps done when a Run of that many iterations leaves the trunk."""
    return iterations - decay_steps(schedule, iterations)


def steps_before_decay(schedule: Schedule, iterations: int) -> int:
    """Steps in which the warmup has to end: those of the trunk, all where a Run has no trunk to leave."""
    return branch_step(schedule, iterations) or iterations


def fewest_iterations(schedule: Schedule) -> int:
    """Length of the shortest Run whose warmup ends before its decay begins."""
    found = max(1, schedule.warmup)
    while (lacking := schedule.warmup - steps_before_decay(schedule, found)) > 0:
        found += lacking  # a longer Run has at most as many more of them
    return found


def is_annealed(schedule: Schedule) -> bool:
    """True if a finished Run ends at a low learning rate, so that its loss is fit for a scaling law."""
    return schedule.kind is not ScheduleKind.CONSTANT


def learning_rate(schedule: Schedule, peak: float, step: int, iterations: int) -> float:
    """Learning rate of the update made at `step`, 0 <= step < iterations."""
    if step < schedule.warmup:
        return trunk_learning_rate(schedule, peak, step)
    floor = schedule.final_fraction
    if schedule.kind is ScheduleKind.COSINE:
        progress = (step + 1 - schedule.warmup) / max(1, iterations - schedule.warmup)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    branch = branch_step(schedule, iterations)
    if schedule.kind is ScheduleKind.WSD and step >= branch:
        progress = (step + 1 - branch) / (iterations - branch)
        return peak * (1 - (1 - floor) * progress)
    return peak


def trunk_learning_rate(schedule: Schedule, peak: float, step: int) -> float:
    """Learning rate of a trunk step: that of any Run which branches later."""
    return peak * (step + 1) / schedule.warmup if step < schedule.warmup else peak
