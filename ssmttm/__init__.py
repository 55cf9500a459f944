"""Text-to-music language models, their codecs and their data; knows nothing of the study engine."""
