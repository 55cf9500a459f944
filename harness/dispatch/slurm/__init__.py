"""The SLURM backend: job arrays, the queue, the job's own script."""
