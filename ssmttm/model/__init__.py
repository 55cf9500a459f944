"""The language model: configuration, layers, the scan and its kernels, counts of parameters and operations."""
