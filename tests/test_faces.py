"""Names that the packages offer themselves, each imported at its first use."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

FACES = {
    "harness": ["load_study", "make_plan"],
    "analysis": ["fit_points", "read_points", "write_report"],
    "ssmttm": ["MusicLM"],
}


@pytest.mark.parametrize("package", FACES)
def test_a_package_offers_its_main_names(package: str) -> None:
    face = importlib.import_module(package)
    assert face.__all__ == FACES[package]
    assert all(callable(getattr(face, name)) for name in face.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = face.nothing


def test_importing_a_package_imports_none_of_its_modules() -> None:
    program = (
        f"import sys, {', '.join(FACES)}\n"
        f"print(*(name for name in sys.modules if name.partition('.')[0] in {list(FACES)} and '.' in name))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
