"""An error in one line: what a library says in many, cut to what a sentence of ours can carry."""

from __future__ import annotations

from pydantic import ValidationError

MOST = 300
"""Characters of a line that are passed on."""


def first_line(error: BaseException, secret: str | None = None) -> str:
    """What an error says, cut to its first line (MLflow's go on with whole web pages); its kind where it is silent.

    `secret`, such as a password, is blotted out before the cut.
    """
    said = str(error).strip()
    lines = (said.replace(secret, "***") if secret else said).splitlines()
    return lines[0][:MOST] if lines else type(error).__name__


def first_mistake(error: ValidationError, whole: str = "the document") -> str:
    """The first thing pydantic found wrong, as key and message; `whole` stands for the key where there is none."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or whole
    return f"{key}: {first['msg']}" if key else first["msg"]
