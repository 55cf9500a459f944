"""Finished runs put to use: scores on held-out captions, and music from a prompt."""
