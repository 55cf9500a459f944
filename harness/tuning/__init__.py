"""Tuning by Optuna: the search space, its trials, their storage, and the transfer to larger sizes."""
