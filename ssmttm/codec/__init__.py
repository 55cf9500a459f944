"""Codecs between audio and tokens: a module for each, behind the protocol in base.py."""
