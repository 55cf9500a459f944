"""The facts on disk: ROOT, journals, checkpoints, results, and what follows from them."""
