"""A user's own law in a file: the example of the guide is fitted, and a wrong one is refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import analysis
from analysis.errors import InputError
from analysis.findings.document import fit_points
from analysis.laws.catalogue import LAWS, law_named, laws_named
from tests.analysis.conftest import checked
from tests.analysis.synthetic import SyntheticStudy, against

GUIDE = (Path(analysis.__file__).parent / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"^    # mylaw\.py\n(?:^    .*\n|^\n)+", GUIDE, flags=re.MULTILINE)
CODE = "\n".join(line[4:] for line in EXAMPLE.splitlines())

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    before = dict(LAWS)

    def written(code: str) -> Path:
        path = tmp_path / "mylaw.py"
        path.write_text(code, encoding="utf-8")
        return path

    yield written
    LAWS.clear()
    LAWS.update(before)


def test_the_law_of_the_guide_is_fitted_like_any_other(write: Write) -> None:
    name = f"{write(CODE)}:ONE_EXPONENT"
    study = SyntheticStudy(against(beta=0.35, B=400.0), cluster_noise=1e-4, row_noise=1e-4)
    document = fit_points(checked(study.table(0)), law=name, resamples=100, reference="cross_transformer")
    assert document.law == "one_exponent"
    assert document.architectures["prefix_simba"].params["alpha"] == pytest.approx(0.35, rel=0.02)
    assert law_named("one_exponent") is law_named(name)
    assert [law.name for law in laws_named(f"chinchilla,{name}")] == ["chinchilla", "one_exponent"]


def test_a_function_that_returns_a_law_is_one_too(write: Write) -> None:
    path = write(f"{CODE}\n\ndef made():\n    return ONE_EXPONENT\n")
    assert law_named(f"{path}:made").name == "one_exponent"


def test_a_file_that_has_changed_is_read_again(write: Write) -> None:
    path = write(CODE)
    before = law_named(f"{path}:ONE_EXPONENT")
    path.write_text(CODE.replace("L = E + A/N^α", "L = E + a/N^α"), encoding="utf-8")
    after = law_named(f"{path}:ONE_EXPONENT")
    assert before.formula != after.formula
    assert law_named("one_exponent") is after


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (None, "", "name the law in the file"),
        (None, ":OTHER", "has no OTHER; its laws are ONE_EXPONENT"),
        (None, ":np", "np is module; it must be"),
        (("axis=2", "axis=7"), ":ONE_EXPONENT", "AxisError"),
        (('"one_exponent"', '"chinchilla"'), ":ONE_EXPONENT", "a law named chinchilla is there already"),
        (("-z[..., 0]", "+z[..., 0]"), ":ONE_EXPONENT", "the derivative by alpha is not that of the loss"),
        (('"A": ("n_params", "alpha"), ', ""), ":ONE_EXPONENT", "depends on the units"),
        (('linear=("E", "A"', 'linear=("A", "E"'), ":ONE_EXPONENT", "must be the first"),
        (("import numpy as np", "import numpy as np\n1 / 0"), ":ONE_EXPONENT", "ZeroDivisionError in line"),
        (("bounds=(EXPONENT,)", "bounds=((1.0, 0.1),)"), ":ONE_EXPONENT", "the lower one first"),
    ],
)
def test_what_is_no_law_is_refused_with_the_reason(
    write: Write, change: tuple[str, str] | None, name: str, reason: str
) -> None:
    before = set(LAWS)
    assert change is None or change[0] in CODE
    path = write(CODE.replace(*change) if change else CODE)
    with pytest.raises(InputError, match=re.escape(reason)):
        law_named(f"{path}{name}")
    assert set(LAWS) == before


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"there is no file nowhere\.py"):
        law_named("nowhere.py:LAW")


def test_a_column_of_another_law_means_the_same_here(write: Write) -> None:
    code = CODE.replace("TOKENS, Law", "TOKENS, Input, Law").replace(
        "inputs=(SIZE, TOKENS)", 'inputs=(SIZE, Input("tokens", "D"))'
    )
    with pytest.raises(InputError, match="column tokens is an input of other laws"):
        law_named(f"{write(code)}:ONE_EXPONENT")
