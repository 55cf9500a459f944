"""Chunks of PyTorch's scan, computed without torch because plans of memory need them."""

import math


def preferred_chunk(d_state: int) -> int:
    """Return the chunk that balances work within chunks against work on states (measured on one CPU core)."""
    if d_state <= 32:
        return 32
    return 64 if d_state <= 256 else 128


def even_chunk(d_state: int, length: int) -> int:
    """Return the length of the chunks of a sequence: even chunks need the least padding."""
    return math.ceil(length / math.ceil(length / preferred_chunk(d_state)))
