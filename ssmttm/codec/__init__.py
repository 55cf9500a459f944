"""Audio to tokens and back, one module a codec behind the protocol in base.py."""
