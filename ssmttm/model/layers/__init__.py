"""Residual sub-layers: a module of each in a file of its own, and beside them, free of torch, their facts."""
