"""Backends: they run tasks on this machine, on SLURM and on Ray, behind one protocol."""
