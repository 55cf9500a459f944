"""Errors in plain sentences: pydantic's mistakes with file, key, value and remedy; other errors cut to a line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ssmttm.errors import InputError

Model = TypeVar("Model", bound=BaseModel)
MAX_CHARACTERS = 300
"""Length of a library's line that is passed on."""


def validate(kind: type[Model], value: Mapping[str, Any], where: str) -> Model:
    """Read `value` as `kind`; raises InputError with a line for every mistake, each beginning with `where`."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise InputError(describe(error, where, kind)) from error


def describe(error: ValidationError, where: str, kind: type[BaseModel]) -> str:
    """Describe every mistake pydantic found, a sentence a line."""
    return "\n".join(f"{where}: {_sentence(detail, kind)}" for detail in error.errors())


def usable_path(value: Path | str) -> Path | str:
    """A path, or a ValueError for what the system would refuse in words of its own, wherever it is first asked."""
    if "\0" in str(value):
        raise ValueError("holds a NUL character, which no path may")
    if len(os.fsencode(value)) > 4000 or any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
        raise ValueError("is longer than a path may be")
    return value


def first_line(error: BaseException, secret: str | None = None) -> str:
    """The first line of an error's text (MLflow's go on with whole web pages); its kind where it has none.

    `secret`, such as a password, is blotted out before the cut.
    """
    text = str(error).strip()
    lines = (text.replace(secret, "***") if secret else text).splitlines()
    return lines[0][:MAX_CHARACTERS] if lines else type(error).__name__


def first_mistake(error: ValidationError, whole: str = "the document") -> str:
    """The first thing pydantic found wrong, as key and message; `whole` stands for the key where there is none."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or whole
    return f"{key}: {first['msg']}" if key else first["msg"]


def _sentence(detail: ErrorDetails, kind: type[BaseModel]) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path) or "the document"
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _names_beside(kind, path[:-1]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}: unknown key (its value is {_short(detail['input'])}){hint}"
    if detail["type"] == "too_short":
        return f"{key}: {_short(detail['input'])}: is empty; name at least one"
    if detail["type"] == "missing":
        return f"{key}: is missing"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not path:
        return message
    return f"{key}: {_short(detail['input'])}: {message}"


def _names_beside(kind: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Names allowed at `path`, where plain attributes lead there; a hint and no more, so never an error."""
    model: Any = kind
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:  # a mapping's key, whose values' type comes next
            continue
        model = _model_within(field.annotation)
    return list(getattr(model, "model_fields", {}))


def _model_within(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in reversed(getattr(annotation, "__args__", ())):
        found = _model_within(part)
        if found is not None:
            return found
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
