"""One E for all architectures, which model the same data: their laws are fitted together.

At a given E the fits of the architectures are independent. So each architecture is fitted alone over a scan of E, and
the best values start one joint minimisation over (E, A_1, B_1, .., alpha_1, beta_1, ..). The joint law is an ordinary
Law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.fitting.profile import profiled
from analysis.fitting.solver import (
    FitResult,
    Problem,
    distinct,
    fit_law,
    limits,
    lowest,
    minimise,
    objective_at,
    polished,
)
from analysis.laws.law import Array, Input, Law

SCAN = 33  # values of E tried
STARTS = 3
SET = Input("set", "")  # number of the architecture that a point belongs to


@dataclass(frozen=True)
class Joint:
    """The joint problem and its result; part k is architecture k, in the order given."""

    law: Law
    parts: tuple[Problem, ...]
    problem: Problem
    result: FitResult

    def own(self, part: int) -> tuple[str, ...]:
        """Return the joint law's names for one architecture's parameters, in the order of its own law."""
        return tuple(own_name(self.law, name, part) for name in self.law.names)

    def split(self, u: Array, part: int) -> Array:
        """Return one architecture's parameters (problems, its own parameters) of the joint ones."""
        names = self.problem.law.names
        out: Array = u[:, [names.index(name) for name in self.own(part)]]
        return out

    def result_of(self, part: int) -> FitResult:
        """Return one architecture's share of the joint result: its parameters and its part of the objective."""
        problem, joint = self.parts[part], self.result
        rivals = self.split(joint.rivals, part)
        u = rivals[:1]
        public = self.law.to_public(u, problem.centre)[0]
        own = self.own(part)
        return FitResult(
            params=dict(zip(self.law.names, public.tolist(), strict=True)),
            u=u[0],
            objective=float(objective_at(problem, u, *problem.copies(1))[0]),
            status=joint.status,
            at_bound=tuple(
                name for name, whole in zip(self.law.names, own, strict=True) if whole in joint.at_bound
            ),
            rivals=rivals,
        )


def own_name(law: Law, name: str, part: int) -> str:
    """Return a parameter's name in the joint law: unchanged if it is shared, else with the architecture's number."""
    return name if name in law.shared else f"{name}/{part}"


def fit_shared(parts: Sequence[Problem]) -> Joint:
    """Fit one law to several sets of points at once, with one E."""
    base = parts[0].law
    # All points in one problem, each set centred on its own means.
    numbered = [np.column_stack([part.z, np.full(len(part.z), number)]) for number, part in enumerate(parts)]
    z, y = np.vstack(numbered), np.concatenate([part.y for part in parts])
    left_out = np.concatenate([part.weight == 0 for part in parts])
    centre = np.zeros(z.shape[1])
    whole = Problem(joint_law(base, len(parts)), z, y, centre, parts[0].delta, left_out=left_out)
    alone = [fit_law(part) for part in parts]
    least = min(float(np.exp(part.y.min())) for part in parts)
    scanned = np.append(np.linspace(0.0, least * 0.999, SCAN), [result.u[0] for result in alone])
    scanned = np.unique(np.clip(scanned, 0.0, least))
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
    found = minimise(whole, *whole.copies(len(starts)), starts, *limits(whole))
    result = polished(whole, found)
    order = np.argsort(found.objective, kind="stable")
    minima, objectives = np.vstack([result.u, found.u[order]]), [result.objective, *found.objective[order]]
    result = replace(result, rivals=distinct(minima, np.array(objectives)))
    return Joint(base, tuple(parts), whole, result)


def refit_shared(joint: Joint, y: Array, w: Array) -> Array:
    """Refit the joint law to resamples y, w (resamples, all points): (resamples, joint parameters)."""
    starts = [np.tile(start, (len(y), 1)) for start in joint.result.rivals[:2]]
    return lowest(joint.problem, y, w, starts, tolerance=1e-7)


def joint_law(base: Law, count: int) -> Law:
    """Return `base` for `count` sets of points with one E; its last input is the number of a point's set."""
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
            # The terms of a point of another set are zero, and so are their derivatives.
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
