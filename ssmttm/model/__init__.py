"""The language model: configuration, layers, the scan, its kernels, and its counts."""
