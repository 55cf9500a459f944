"""The extras of the project, and the one that brings a missing package."""

from __future__ import annotations

EXTRAS = {
    "train": ("deepspeed", "huggingface_hub", "mlflow", "safetensors", "torch", "transformers"),
    "analysis": ("jinja2", "matplotlib", "pandas", "plotly", "pyarrow", "scipy"),
    "serve": ("flask_wtf", "psycopg", "psycopg2"),
    "slurm": ("submitit",),
    "ray": ("ray",),
    "codecs": ("encodec", "torchaudio"),
    "tune": ("optuna",),
    "audio": ("music21", "pretty_midi", "sklearn", "soundfile", "soxr", "symusic"),
}
"""Packages users meet first, by the extra that brings them."""


def missing_package(error: ModuleNotFoundError) -> str:
    """Return a sentence that names the missing package and how to install it."""
    name = (error.name or "").split(".")[0]
    extra = next((extra for extra, names in EXTRAS.items() if name in names), "all")
    return f"the package {name} is not installed; pip install 'ssmscale[{extra}]' brings it"
