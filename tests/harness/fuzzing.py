"""Fuzz tests: cases that are the same every time, values that no user means, and the answers that are allowed.

A case is well formed if it is a valid document with at most some values changed. At least half of the cases are:
random bytes are refused at once and reach no mistake further in.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import Answer

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 255, 2**31, 2**53 + 1, 2**63, 2**64, 10**30]),
    st.sampled_from([0.5, -0.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]),
    st.sampled_from(
        ["", ".", "..", "/", "../../up", "/etc/passwd", "a" * 300, "\0", "true", "1e-3", "nan", "\ud7ff"]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@dataclass(frozen=True)
class Case:
    """One input."""

    kind: str
    """valid: must be accepted; mutated: well formed, some values changed; broken: anything."""
    content: Any


SHARES = {"valid": 0.3, "mutated": 0.4, "broken": 0.3}


def repeat(
    cases: int, strategy: Callable[[str], st.SearchStrategy[Case]], check: Callable[[Case], None]
) -> None:
    """Check so many cases, the same ones every time, at least half of them well formed."""
    seen: Counter[str] = Counter()

    def once(case: Case) -> None:
        seen[case.kind] += 1
        check(case)

    for kind, share in SHARES.items():
        steady = settings(
            max_examples=math.ceil(share * cases),
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        steady(given(strategy(kind))(once))()
    assert seen.total() >= cases, seen
    assert 2 * (seen["valid"] + seen["mutated"]) >= seen.total(), seen


@st.composite
def mutations(draw: st.DrawFn, document: Any, most: int = 3) -> Any:
    """Draw the document with some values replaced, removed or added."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        found = list(places(changed))
        if not found:
            break
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        action = draw(
            st.sampled_from(["replace", "replace", "stretch", "stretch", "stretch", "remove", "add"])
        )
        if action == "stretch" and (alike := _alike(holder[key])) is not None:
            holder[key] = draw(alike)  # of the right type, so that it is read further
        elif action in {"replace", "stretch"}:
            holder[key] = draw(JUNK)
        elif action == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.text(min_size=1, max_size=8))] = draw(JUNK)
        else:
            holder.append(draw(JUNK))
    return changed


WHOLE = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 255, 10**6, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**30, 10**400]
)
REAL = st.sampled_from(
    [0.0, 0.5, 1.0, -0.0, -1.0, 1e-300, 5e-324, 1e300, 1.7e308, math.nan, math.inf, -math.inf]
)
TEXT = st.sampled_from(
    ["", ".", "..", "/", "../../up", "/dev/null", "a" * 300, "\0", "\n", "[bold]", "\x1b[2J", "é" * 50]
)


def _alike(value: Any) -> st.SearchStrategy[Any] | None:
    """Return unusual values of the same type."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return WHOLE
    if isinstance(value, float):
        return REAL
    return TEXT if isinstance(value, str) else None


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the place of every value of a document: its container and its key."""
    items: Any = ()
    if isinstance(document, dict):
        items = list(document.items())
    elif isinstance(document, list):
        items = list(enumerate(document))
    for key, value in items:
        yield document, key
        yield from places(value)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw the bytes with some cut, flipped, doubled or inserted."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        action = draw(st.sampled_from(["flip", "cut", "put in", "double", "end"]))
        if action == "flip" and changed:
            changed[at] ^= draw(st.integers(1, 255))
        elif action == "cut":
            del changed[at : at + draw(st.integers(1, 40))]
        elif action == "put in":
            changed[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif action == "double":
            changed[at:at] = changed[at : at + 60]
        else:
            del changed[at:]
    return bytes(changed)


def dumped(document: Any) -> bytes:
    """Return JSON as Python writes it, with NaN and Infinity."""
    return json.dumps(document, indent=1).encode()


def hashes(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, by its path; of a folder "folder"."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
        if path.suffix != ".lock" and path.name != "lock"
    }


def refused(answer: Answer, *names: str) -> bool:
    """True if input was refused; it must be with status 2, a sentence that names it and no traceback."""
    assert "Traceback" not in answer.err, answer.err
    assert "unexpected " not in answer.err, answer.err
    if answer.status == 0:
        return False
    assert answer.status == 2, (answer.status, answer.err)
    assert answer.err.startswith("error: "), answer.err
    for name in names:
        assert name in answer.err.replace("\n", ""), (name, answer.err)
    return True


def refusal_of(call: Callable[[], object], kind: type[Exception]) -> str | None:
    """Return the sentence with which a call refuses its input, None if it accepts it; other errors are raised."""
    try:
        call()
    except kind as error:
        sentence = str(error)
    else:
        return None
    assert len(sentence.splitlines()) == 1, sentence
    return sentence


def strictly(text: str) -> Any:
    """Return a JSON document; fail at NaN and Infinity, which JSON does not have."""

    def never(constant: str) -> None:
        raise AssertionError(f"{constant} in {text[:200]}")

    return json.loads(text, parse_constant=never)


class Planted:
    """A pickle and a YAML tag that make a folder if they are executed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        import os

        return os.mkdir, (str(self.folder),)

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(self)

    @property
    def tag(self) -> str:
        return f"!!python/object/apply:os.mkdir ['{self.folder}']"

    def assert_not_executed(self) -> None:
        assert not self.folder.exists()
