"""The names that data sets give to the parts of a caption's record, and the texts of its values."""

import io
import math
import re
import tokenize
from ast import literal_eval
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ssmttm.files import parse_json

NAME_KEYS = (
    *("path", "file", "file_name", "filename", "filepath", "file_path", "audio", "audio_path", "audio_file"),
    *("audio_filepath", "location", "ytid", "youtube_id", "track_id", "id"),
)
CAPTION_KEYS = ("caption", "captions", "text", "description", "prompt", "main_caption")
LICENCE_KEYS = ("licence", "license")
START_KEYS = ("start_s", "start_time", "start_seconds")
_NUMBERED = re.compile(r"(?:captions?|texts?|descriptions?)_?(\d+)")
_NOTHING = {"", "nan", "none", "null"}  # as pandas and JSON write a missing value


@lru_cache(1000)
def key_of(name: str) -> str:
    """Return the key that a column's name stands for: `File Name` is file_name."""
    return re.sub(r"[\s.\-]+", "_", name.strip().lower())


def is_caption(key: str) -> bool:
    """Return True if the values of a key are captions: caption, text, caption_1 and the like."""
    return key in CAPTION_KEYS or _NUMBERED.fullmatch(key) is not None


def captions_of(record: Mapping[str, Any]) -> list[str]:
    """Return all captions of a record whose keys are those of `key_of`, in their order."""
    found = next((texts for key in CAPTION_KEYS if (texts := texts_of(record.get(key)))), [])
    numbered = sorted((int(match[1]), key) for key in record if (match := _NUMBERED.fullmatch(key)))
    return [*found, *(text for _, key in numbered for text in texts_of(record[key]))]


def first_of(record: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """Return the text of the first key that has one, else an empty text."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, Mapping):  # as the hub's data sets name a sound file
            value = value.get("path")
        if isinstance(value, list) and value:
            value = value[0]
        text = value.strip() if isinstance(value, str) else _number(value)
        if text.lower() not in _NOTHING:
            return text
    return ""


def texts_of(value: Any, *, may_be_list: bool = True) -> list[str]:
    """Return the texts of a value: a text or number itself, all texts of a list, the captions of a record.

    may_be_list: take a text such as "['a', 'b']" for the list that it shows.
    """
    if isinstance(value, str):
        if may_be_list and (shown := _shown_list(value.strip())) is not None:
            return shown
        text = " ".join(value.split())
        return [] if text.lower() in _NOTHING else [text]
    if isinstance(value, Mapping):
        return captions_of({key_of(key): one for key, one in value.items()})
    if isinstance(value, list | tuple):
        return [text for one in value for text in texts_of(one, may_be_list=may_be_list)]
    return [number] if (number := _number(value)) else []


def _number(value: Any) -> str:
    """Return the text of a number, else an empty text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return str(int(value) if value == int(value) else value)


def _shown_list(text: str) -> list[str] | None:
    """Return the texts of a list that JSON, Python or NumPy wrote as text; None if it is another text."""
    if text[:1] + text[-1:] not in ("[]", "()"):
        return None
    try:
        data = parse_json(text)
    except ValueError:
        pass
    else:
        return [one for value in data for one in texts_of(value)]
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            # NumPy writes no commas, and Python would join such neighbours: each token is a text of its own.
            if token.type == tokenize.STRING:
                found += texts_of(literal_eval(token.string), may_be_list=False)
            elif token.type not in _LAYOUT and token.string not in ("[", "]", "(", ")", ",", "None", "nan"):
                return None
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    return found


_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT}
