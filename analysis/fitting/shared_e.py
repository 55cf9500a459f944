"""One E for all architectures: their laws fitted together, since they model the same data.

At a given E the architectures' fits separate. So E is scanned with each fitted alone, and the best of the scan starts
one joint minimisation over (E, A_1, B_1, .., alpha_1, beta_1, ..). The joint law is a law like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.fitting.profile import profiled
from analysis.fitting.solver import (
    FitResult,
    Problem,
    distinct,
    ended,
    fit_law,
    limits,
    minimise,
    objective_at,
    on_bound,
)
from analysis.laws.law import Array, Input, Law

SCAN = 33  # values of E tried
STARTS = 3
SET = Input("set", "")  # number of the architecture that a point is of


@dataclass(frozen=True)
class Joint:
    """The joint problem and its result; part k of it is architecture k, in the order given."""

    law: Law
    problem: Problem
    result: FitResult
    parts: tuple[Problem, ...]

    def own(self, part: int) -> tuple[str, ...]:
        """Names of one architecture's parameters in the joint law, in the order of its own law."""
        return tuple(own_name(self.law, name, part) for name in self.law.names)

    def split(self, u: Array, part: int) -> Array:
        """One architecture's parameters (problems, its own parameters) out of joint ones."""
        names = self.problem.law.names
        out: Array = u[:, [names.index(name) for name in self.own(part)]]
        return out

    def result_of(self, part: int) -> FitResult:
        """One architecture's share of the joint result: its parameters, and its part of the objective."""
        problem, joint = self.parts[part], self.result
        rivals = self.split(joint.rivals, part)
        u = rivals[:1]
        public = self.law.to_public(u, problem.centre)[0]
        own = self.own(part)
        return FitResult(
            law=self.law,
            params={name: float(value) for name, value in zip(self.law.names, public, strict=True)},
            u=u[0],
            objective=float(objective_at(problem, u, problem.y[None], np.ones((1, len(problem.y))))[0]),
            status=joint.status,
            at_bound=tuple(
                name for name, whole in zip(self.law.names, own, strict=True) if whole in joint.at_bound
            ),
            rivals=rivals,
        )


def own_name(law: Law, name: str, part: int) -> str:
    """A parameter's name in the joint law: its own where it is shared, else with the architecture's number."""
    return name if name in law.shared else f"{name}/{part}"


def fit_shared(parts: Sequence[Problem]) -> Joint:
    """Fit one law to several sets of points at once, with one E."""
    base = parts[0].law
    whole = _whole(parts)
    alone = [fit_law(part) for part in parts]
    lowest = min(float(np.exp(part.y.min())) for part in parts)
    scanned = np.append(np.linspace(0.0, lowest * 0.999, SCAN), [result.u[0] for result in alone])
    scanned = np.unique(np.clip(scanned, 0.0, lowest))
    best, total = [], np.zeros(len(scanned))
    for part, result in zip(parts, alone, strict=True):
        starts = np.repeat(result.rivals[:, None], len(scanned), axis=1)
        u, value = profiled(part, "E", scanned, starts)
        best.append(u)
        total += value
    chosen = np.argsort(total, kind="stable")[:STARTS]
    k = len(base.linear)
    linear = [best[0][chosen, :1], *(u[chosen, 1:k] for u in best)]
    starts = np.concatenate([*linear, *(u[chosen, k:] for u in best)], axis=1)
    y, w = np.tile(whole.y, (len(starts), 1)), np.ones((len(starts), len(whole.y)))
    low, high = limits(whole)
    found = minimise(whole, y, w, starts, low, high)
    order = np.argsort(found.objective, kind="stable")
    final = minimise(whole, y[:1], w[:1], found.u[order[:1]], low, high, tolerance=1e-15)
    hit = on_bound(whole, final.u)[0]
    at_bound = tuple(name for name, at in zip(whole.law.names, hit, strict=True) if at)
    result = FitResult(
        law=whole.law,
        params={},
        u=final.u[0],
        objective=float(final.objective[0]),
        status=ended(whole, final, at_bound, len(whole.y)),
        at_bound=at_bound,
        rivals=distinct(
            np.vstack([final.u, found.u[order]]), np.append(final.objective, found.objective[order])
        ),
    )
    return Joint(base, whole, result, tuple(parts))


def refit_shared(joint: Joint, y: Array, w: Array) -> Array:
    """Resamples of the joint fit (resamples, joint parameters) at y, w (resamples, all points), warm-started."""
    low, high = limits(joint.problem)
    best, value = np.tile(joint.result.u, (len(y), 1)), np.full(len(y), np.inf)
    for start in joint.result.rivals[:2]:
        found = minimise(
            joint.problem, y, w, np.tile(start, (len(y), 1)), low, high, max_iter=60, tolerance=1e-7
        )
        better = found.objective < value
        best = np.where(better[:, None], found.u, best)
        value = np.where(better, found.objective, value)
    return best


def joint_law(base: Law, count: int) -> Law:
    """`base` for `count` sets of points with one E; a last input says which set a point is of."""
    k, m = len(base.linear), len(base.nonlinear)

    def own(values: Array, part: int, width: int) -> Array:
        return values[:, part * width : (part + 1) * width]

    def terms(theta: Array, z: Array) -> Array:
        columns = [np.ones((len(theta), z.shape[-2], 1))]
        for part in range(count):
            phi = base.terms(own(theta, part, m), z[..., :-1])
            columns.append(phi[:, :, 1:] * (z[..., -1] == part)[..., None])
        return np.concatenate(columns, axis=2)

    def bends(phi: Array, z: Array, coefficients: Array) -> Array:
        columns = []
        for part in range(count):
            mine = phi[:, :, 1 + part * (k - 1) : 1 + (part + 1) * (k - 1)]
            c = np.concatenate([coefficients[:, :1], own(coefficients[:, 1:], part, k - 1)], axis=1)
            # Where a point is of another set, its terms are zero and so are their derivatives.
            columns.append(base.bends(np.concatenate([phi[:, :, :1], mine], axis=2), z[..., :-1], c))
        return np.concatenate(columns, axis=2)

    return Law(
        name=base.name,
        formula=base.formula,
        inputs=(*base.inputs, SET),
        linear=("E", *(own_name(base, name, part) for part in range(count) for name in base.linear[1:])),
        nonlinear=tuple(own_name(base, name, part) for part in range(count) for name in base.nonlinear),
        bounds=base.bounds * count,
        terms=terms,
        bends=bends,
        scaled={},
    )


def _whole(parts: Sequence[Problem]) -> Problem:
    """All points in one problem, each set still centred on its own."""
    law = joint_law(parts[0].law, len(parts))
    z = np.vstack(
        [np.column_stack([part.z, np.full(len(part.z), number)]) for number, part in enumerate(parts)]
    )
    y = np.concatenate([part.y for part in parts])
    return Problem(law, z, y, np.zeros(z.shape[1]), parts[0].delta)
