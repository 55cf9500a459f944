"""Checks of this machine and of clusters, each with what to do where it fails."""
