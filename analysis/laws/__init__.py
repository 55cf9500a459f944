"""Scaling laws: their terms, their derivatives, and the columns they read."""
