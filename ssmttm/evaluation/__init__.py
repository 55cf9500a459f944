"""How good a trained model is: held-out loss, Frechet distance, KL divergence and CLAP score."""
