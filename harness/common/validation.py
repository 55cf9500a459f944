"""Strict YAML and its validation; every error is a sentence with file, key, value and remedy."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from harness.common.address import redact
from ssmttm.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


def validate(kind: type[Model], value: Mapping[str, Any], where: str) -> Model:
    """Read `value` as `kind`; raises InputError with a line for every mistake, each beginning with `where`."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        lines = [f"{where}: {_sentence(detail, kind)}" for detail in error.errors()]
        raise InputError("\n".join(lines)) from error


def usable_path(value: Path | str) -> Path | str:
    """Return the path; raises ValueError for one that the system would refuse."""
    if "\0" in str(value):
        raise ValueError("holds a NUL character, which no path may")
    if len(os.fsencode(value)) > 4000 or any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
        raise ValueError("is longer than a path may be")
    return value


def first_line(error: BaseException, secret: str | None = None) -> str:
    """Return the first line of an error's text, else the name of its class; passwords and `secret` become ***."""
    text = str(error).strip()
    lines = redact(text.replace(secret, "***") if secret else text).splitlines()
    return lines[0][:300] if lines else type(error).__name__


def first_mistake(error: ValidationError, whole: str = "the document") -> str:
    """Return pydantic's first error as key and message; `whole` replaces an empty key."""
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
    """Return the names allowed at `path`, as far as plain attributes lead there: they serve as a hint only."""
    model: Any = kind
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is not None:  # else it is the key of a mapping
            model = _model_within(field.annotation)
    return list(getattr(model, "model_fields", {}))


def _model_within(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = map(_model_within, reversed(getattr(annotation, "__args__", ())))
    return next((model for model in models if model is not None), None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


MAX_BYTES = 200_000
"""Most bytes of a YAML file, which takes seconds to read already."""


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: yaml.AliasEvent = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}: aliases are not accepted, write the value out",
                problem_mark=cast("yaml.error.Mark | None", event.start_mark),
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                why = " appears twice" if isinstance(key, str) else ": keys must be text"
                raise yaml.MarkedYAMLError(problem=f"key {key!r}{why}", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping of a YAML file; raises InputError naming the file and the line."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes; is this a study?")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    document = read_yaml_value(text, str(path))
    if not isinstance(document, dict):
        held = "is empty" if document is None else f"holds a {type(document).__name__}"
        raise InputError(f"{path}: {held}; a study is a mapping of keys to values")
    return document


def read_yaml_value(text: str, where: str) -> Any:
    """Read YAML, such as a value of the command line; raises InputError beginning with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader, made stricter
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}:{line} {error.problem or 'is not YAML'}".replace(": :", ":")) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{where}: is not YAML ({first_line(error)})") from error


def yaml_text(document: Any) -> str:
    """Write a document as YAML for users: blocks above, the innermost mappings and lists on one line."""
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
