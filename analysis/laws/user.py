"""A user's own law, in one Python file that the command line names: --law mylaw.py:LAW.

The file is code of the user, who asks for it to be run. It has a `Law`, or a function that returns one. No point is
fitted before the law's derivatives and its change of units hold: wrong ones would give wrong numbers, not an error.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from types import ModuleType

import numpy as np

from analysis.errors import InputError
from analysis.laws.law import Input, Law

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
STEP, CLOSE = 1e-5, 1e-4
REACH = 1.5  # half the width, in logarithms, of the inputs at which a law is tried

_LOADED: dict[tuple[Path, str], tuple[str, Law]] = {}
"""The laws read so far, with the text of their file: a report names its law again and again."""


def is_file(name: str) -> bool:
    """True if the name of a law is that of a file: mylaw.py:LAW, or mylaw.py."""
    return ".py:" in name or name.endswith(".py")


def law_of_file(spec: str, laws: MutableMapping[str, Law]) -> Law:
    """Return the law of `FILE.py:NAME` and add it to `laws`.

    Raises InputError for a file or a name that is not there, code that fails, an object that is no law, a law whose
    derivatives or change of units are wrong, and a name or a column that is taken.
    """
    where = f"--law {spec}"
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise InputError(f"{where}: name the law in the file too, such as {spec.rstrip(':')}:LAW.")
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"{where}: there is no file {place}.")
    source = path.read_text(encoding="utf-8")
    before, known = _LOADED.get((path, name), (None, None))
    if known is not None and before == source:
        laws.setdefault(known.name, known)
        return known
    law = _law_in(path, source, name, where)
    _check_form(law, where)
    taken = laws.get(law.name)
    if taken is not None and taken is not law and taken is not known:
        raise InputError(f"{where}: a law named {law.name} is there already; give yours another name.")
    _check_columns(law, [one for one in laws.values() if one is not taken], where)
    _check_numbers(law, where)
    laws[law.name] = law
    _LOADED[path, name] = source, law
    return law


def _law_in(path: Path, source: str, name: str, where: str) -> Law:
    """Run the file and return the law of that name, or raise InputError."""
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        # No import: that would leave compiled code beside the user's file, and take it for the file when that changes.
        exec(compile(source, path, "exec"), vars(module))  # noqa: S102
        found = getattr(module, name, None)
        made = found() if callable(found) and not isinstance(found, Law) else found
    except SyntaxError as error:
        raise InputError(
            f"{where}: SyntaxError in line {error.lineno} of {path.name}: {error.msg}."
        ) from error
    except Exception as error:
        raise InputError(f"{where}: {_failure(error)}.") from error
    if found is None:
        there = sorted(key for key, value in vars(module).items() if isinstance(value, Law))
        has = f"its laws are {', '.join(there)}" if there else "it has no analysis.laws.law.Law"
        raise InputError(f"{where}: {path.name} has no {name}; {has}.")
    if not isinstance(made, Law):
        raise InputError(
            f"{where}: {name} is {type(made).__name__}; it must be an analysis.laws.law.Law, or a function that "
            "returns one."
        )
    return made


def _failure(error: Exception) -> str:
    """Write an error with the innermost line of the code that raised it."""
    line = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in line {line.lineno} of {Path(line.filename).name}: {error}"


def _check_form(law: Law, where: str) -> None:
    """Raise InputError for names, bounds and inputs that do not fit together."""
    axes = [one.axis for one in law.inputs if one.axis]
    scaled = [(coefficient, *pair) for coefficient, pair in law.scaled.items()]
    wrong = ""
    if not NAME.fullmatch(law.name) or law.name == "auto":
        wrong = f"name {law.name!r} must be letters, digits and underscores, and not auto"
    elif "E" in law.names[1:]:
        wrong = "E, the irreducible loss, must be the first of the linear parameters"
    elif len(set(law.names)) < len(law.names):
        wrong = f"a parameter is named twice: {', '.join(law.names)}"
    elif len(law.bounds) != len(law.nonlinear):
        wrong = f"bounds has {len(law.bounds)} pairs for {len(law.nonlinear)} nonlinear parameters"
    elif not all(np.isfinite(bound).all() and bound[0] < bound[1] for bound in law.bounds):
        wrong = "every pair of bounds must be finite, the lower one first"
    elif not law.inputs or len(set(axes)) < len(axes):
        wrong = "inputs must have at most one of size and one of data, and one at least"
    elif any(
        one not in law.names or by not in law.names or column not in law.columns for one, column, by in scaled
    ):
        wrong = "scaled must map a parameter to (column, parameter) of this law"
    elif law.shared:
        wrong = "shared parameters are for the laws of the catalogue"
    if wrong:
        raise InputError(f"{where}: {wrong}.")


def _check_columns(law: Law, others: list[Law], where: str) -> None:
    known: dict[str, Input] = {one.column: one for other in others for one in other.inputs}
    for one in law.inputs:
        if one.column in known and one != known[one.column]:
            raise InputError(
                f"{where}: column {one.column} is an input of other laws; import it from analysis.laws.law, or name "
                "another column."
            )


def _check_numbers(law: Law, where: str) -> None:
    """Raise InputError unless derivatives equal finite differences, and a change of units changes no loss."""
    rng = np.random.default_rng(0)
    z = rng.uniform(-REACH, REACH, (7, len(law.inputs)))
    low, high = np.array(law.bounds, dtype=np.float64).reshape(-1, 2).T
    share = rng.uniform(0.2, 0.4, (3, len(low)))
    # Where no bound is negative, logarithms: exponents are far below their upper bound.
    even = low + share * (high - low)
    theta = np.where(
        low > 0, np.maximum(low, 1e-300) ** (1 - share) * np.maximum(high, 1e-300) ** share, even
    )
    u = np.concatenate([rng.uniform(0.5, 2.0, (3, len(law.linear))), theta], axis=1)
    try:
        loss, jacobian = law.predict_with_jacobian(u, z)
        alone = law.predict(u, z)
        slopes = []
        for j in range(u.shape[1]):
            step = np.zeros_like(u)
            step[:, j] = STEP * np.maximum(1e-2, np.abs(u[:, j]))
            rise = law.predict(u + step, z) - law.predict(u - step, z)
            slopes.append(rise / (2 * step[:, j, None]))
        centre = rng.uniform(2.0, 4.0, len(law.inputs))
        for j, one in enumerate(law.inputs):
            if one.centred_as is not None:
                centre[j] = centre[law.columns.index(one.centred_as)]
        public = law.to_public(u, centre)
        moved = law.predict(public, z + centre)
        back = law.to_solver(public, centre)
    except Exception as error:
        raise InputError(f"{where}: {_failure(error)}.") from error
    if loss.shape != (3, 7) or jacobian.shape != (3, 7, u.shape[1]):
        raise InputError(
            f"{where}: of 3 problems and 7 points the loss has shape {loss.shape} and its derivative {jacobian.shape}; "
            f"they must be (3, 7) and (3, 7, {u.shape[1]})."
        )
    if not (np.isfinite(loss).all() and np.isfinite(jacobian).all()):
        raise InputError(f"{where}: the loss or its derivative is not finite inside the bounds.")
    if not np.allclose(loss, alone, rtol=1e-9):
        raise InputError(f"{where}: predict and predict_with_jacobian disagree on the loss.")
    for j, name in enumerate(law.names):
        size = float(np.abs(slopes[j]).max())
        if not np.allclose(jacobian[:, :, j], slopes[j], rtol=CLOSE, atol=CLOSE * size + 1e-9):
            raise InputError(
                f"{where}: the derivative by {name} is not that of the loss: it is {jacobian[0, 0, j]:.6g} where "
                f"finite differences give {slopes[j][0, 0]:.6g}."
            )
    if not (np.allclose(moved, loss, rtol=1e-6) and np.allclose(back, u, rtol=1e-6)):
        raise InputError(
            f"{where}: the loss depends on the units of its inputs: `scaled` must name every coefficient whose term "
            "is a power of an input."
        )
