"""Strict YAML and its validation; every error is a sentence with file, key, value and remedy."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_core import ErrorDetails

from harness.common.address import lasting, redact
from ssmttm.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


def validate(
    kind: type[Model], value: Mapping[str, Any], where: str, changes: Mapping[str, str] | None = None
) -> Model:
    """Read `value` as `kind`; raises InputError with a line for every mistake, each beginning with `where`.

    `changes` has the options that set a key in place of `where`: a mistake in or below such a key begins with its
    option.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = error.errors()
        lines = [
            f"{_origin(detail['loc'], where, changes or {})}: {_sentence(detail, kind)}"
            for detail in found
            if not _follows(detail, found)
        ]
        raise InputError("\n".join(lines)) from error


AnyPath = TypeVar("AnyPath", Path, str)


def with_home(value: AnyPath) -> AnyPath:
    """Return the path with ~ expanded; one of a user that this machine does not know stays as it is."""
    try:
        return type(value)(Path(value).expanduser()) if str(value).startswith("~") else value
    except RuntimeError:
        return value


def usable_path(value: AnyPath) -> AnyPath:
    """Return the path with ~ expanded; raises ValueError for one that the system would refuse."""
    value = with_home(value)
    if "\0" in str(value):
        raise ValueError("holds a NUL character, which no path may")
    if len(os.fsencode(value)) > 4000 or any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
        raise ValueError("is longer than a path may be")
    return value


PlainPath = Annotated[Path, AfterValidator(usable_path)]
Address = Annotated[str, AfterValidator(lasting)]
"""Address of a tracker or a database."""


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


def _origin(place: tuple[int | str, ...], where: str, changes: Mapping[str, str]) -> str:
    key = ".".join(map(str, place))
    within = [option for changed, option in changes.items() if f"{key}.".startswith(f"{changed}.")]
    return within[-1] if within else where


def _follows(detail: ErrorDetails, found: Sequence[ErrorDetails]) -> bool:
    """True if a list or mapping counts as empty because its entries were refused, for reasons of their own."""
    place = detail["loc"]
    return detail["type"] == "too_short" and any(
        other["loc"][: len(place)] == place and len(other["loc"]) > len(place) for other in found
    )


KINDS = {"tuple": "a list", "dictionary": "a mapping of keys to values"}
"""Words of YAML for pydantic's."""


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
    for word, plain in KINDS.items():
        message = re.sub(rf"a valid {word}( or instance of \w+)?", plain, message)
    if detail["type"] in {"enum", "literal_error"}:
        allowed = re.findall(r"'([^']*)'", message)
        near = difflib.get_close_matches(str(detail["input"]), allowed, n=1)
        message += f"; did you mean {near[0]!r}?" if near else ""
    if (
        detail["type"].startswith("int")
        and isinstance(detail["input"], float)
        and detail["input"].is_integer()
    ):
        message += f"; write {int(detail['input'])}"
    key = key.removesuffix(".[key]")
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

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Return a number that YAML and its reader take for the same; `010` is 8 to YAML, and `1:40` is 100."""
        text, kind = str(node.value), node.tag.rpartition(":")[2]
        read = super().construct_yaml_int if kind == "int" else super().construct_yaml_float
        value: int | float = read(node)
        if ":" in text or re.fullmatch(r"[-+]?0[0-9_]+", text):
            plain = text[: text[0] == "-"] + (text.lstrip("+-0_").replace("_", "") or "0")
            meant = "a number without colons" if ":" in text else plain
            problem = f"{text}: is {value:g} in YAML; write {meant}, or {text!r} with its quotes for a text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value


_BOOL, _TIME = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
# `no`, `on` and dates are text: a key that takes true or false also takes yes, no, on and off.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in {_BOOL, _TIME}]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
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
