"""Captions as conditioning: bytes, or the cached embeddings of a frozen encoder."""
