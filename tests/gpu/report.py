"""The lines of the check: each begins with PASS, FAIL or NOTE."""

from __future__ import annotations


def note(text: str) -> None:
    """Report a figure that nothing is held against."""
    print("NOTE", text, flush=True)


def verdict(holds: bool, text: str) -> None:
    """Report a claim and if it holds."""
    print("PASS" if holds else "FAIL", text, flush=True)
