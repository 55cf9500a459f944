"""A real SLURM on one machine: to try the harness, and to test it against the daemons themselves."""
