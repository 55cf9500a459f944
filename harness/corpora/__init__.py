"""Corpora built by the tasks of a backend: locally, as SLURM jobs, or by Ray Data."""
