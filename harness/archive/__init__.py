"""Bundles of studies, exported and merged, and the pruning of checkpoints."""
