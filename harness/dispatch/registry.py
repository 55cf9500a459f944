"""Backends by name; a backend is imported when it is first opened."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from harness.dispatch.base import Backend, SubmitTarget

BACKENDS = {
    "local": "harness.dispatch.local:LocalBackend",
    "slurm": "harness.dispatch.slurm.backend:SlurmBackend",
    "ray": "harness.dispatch.ray.packed:PackedBackend",
    "ray-here": "harness.dispatch.ray.here:RayHere",
    "ray-cluster": "harness.dispatch.ray.existing:RayCluster",
}
"""Module and class of each. Without a cluster profile `--on ray` selects one of the last two."""


def open_backend(name: str, study_dir: Path, target: SubmitTarget, jobs: int | None = None) -> Backend:
    """Open a backend for a study; a backend that runs tasks here runs at most `jobs` at once."""
    module, _, kind = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), kind)(study_dir, target, jobs)
    return backend
