"""Searching keys of a study for its smaller sizes, and how the best learning rate moves with size."""
