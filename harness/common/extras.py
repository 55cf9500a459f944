"""The extras of the project: the packages of each, and the extra that brings a missing package."""

from __future__ import annotations

from typing import NamedTuple


class Extra(NamedTuple):
    """One extra of pyproject.toml."""

    packages: tuple[str, ...] = ()
    """Packages that `ssmscale doctor` looks for, as an index names them."""
    modules: tuple[str, ...] = ()
    """Other modules whose import may fail first."""


EXTRAS = {
    "train": Extra(("torch", "deepspeed", "mlflow", "transformers"), ("huggingface_hub", "safetensors")),
    "analysis": Extra(("pandas", "scipy", "plotly", "matplotlib"), ("jinja2", "pyarrow")),
    "audio": Extra(
        ("av", "music21", "symusic", "pretty_midi", "scikit-learn", "soundfile"), ("sklearn", "soxr")
    ),
    "slurm": Extra(("submitit",)),
    "ray": Extra(("ray",)),
    "serve": Extra(modules=("psycopg", "psycopg2")),
    "codecs": Extra(modules=("encodec", "torchaudio")),
    "tune": Extra(modules=("optuna",)),
}


def missing_package(error: ModuleNotFoundError) -> str:
    """Return a sentence that names the missing package and the command that installs it."""
    name = (error.name or "").split(".")[0]
    extra = next((key for key, extra in EXTRAS.items() if name in extra.packages + extra.modules), "all")
    return f"the package {name} is not installed; install it with: pip install 'ssmscale[{extra}]'"
