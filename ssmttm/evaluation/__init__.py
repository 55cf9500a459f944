"""Scores of a trained model: held-out loss, Frechet distance, KL divergence and CLAP score."""
