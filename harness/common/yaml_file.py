"""Reading YAML that users wrote: safely, and with every mistake named by file and line.

Plain safe loading still expands aliases without bound (a few lines can stand for gigabytes), takes the last of
two equal keys in silence and reads 1e-3 as text. This reader refuses aliases and repeated keys, bounds the
file's size and reads 1e-3 as the number it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import yaml

from harness.common.validation import first_line
from ssmttm.errors import InputError

MAX_BYTES = 1_000_000


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
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r}: keys are text", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} appears twice", problem_mark=key_node.start_mark
                )
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
    document = _parse(text, str(path))
    if not isinstance(document, dict):
        held = "is empty" if document is None else f"holds a {type(document).__name__}"
        raise InputError(f"{path}: {held}; a study is a mapping of keys to values")
    return document


def read_yaml_value(text: str, where: str) -> Any:
    """Read one YAML value, as given on the command line; `where` names it in the error."""
    return _parse(text, where)


def _parse(text: str, where: str) -> Any:
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
