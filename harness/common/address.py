"""Addresses of trackers and databases: shown and stored without their passwords, and the files of SQLite's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, unquote, unquote_plus, urlsplit

KEYS = "password|passwd|pwd|sslpassword|access_token"
LOGIN = re.compile(r"([a-zA-Z][\w+.-]*://[^\s:@/\"'<>]*):(?!\d+(?:[/?#]|$))[^\s\"'<>]+@")
"""Scheme, user and password of an address, up to the last @ of the word: an unquoted password may hold / and @."""
BARE_LOGIN = re.compile(r"([^\s:@/]+):[^\s]+@(?=\S)")
"""User and password of a word that has no scheme."""
SECRET = re.compile(rf"(?i)((?<!\w)(?:{KEYS})\s*=\s*)(\"[^\"]*\"|'[^']*'|[^\s&;,\"'<>)]+)")
ODBC = re.compile(r"(?i)(odbc_connect=)[^&\s\"']+")
ODBC_SECRET = re.compile(r"(?i)(?:(?<=;)|^)\s*(?:pwd|password)\s*=\s*(?:\{(?:[^}]|\}\})*\}|[^;]*);?")
"""A password within the value of odbc_connect; one with a semicolon stands in braces."""


def redact(text: str) -> str:
    """Return any text with *** in place of the passwords in its addresses."""
    if "@" in text:
        text = LOGIN.sub(r"\1:***@", text)
        if BARE_LOGIN.match(text) and "://" not in text and " " not in text.strip():
            text = BARE_LOGIN.sub(r"\1:***@", text)
    if "=" in text:
        text = SECRET.sub(r"\1***", ODBC.sub(r"\1***", text))
    return text


def has_password(address: str) -> bool:
    """True if an address holds a password, wherever that stands."""
    return without_password(address) != address


def without_password(address: str) -> str:
    """Return an address without its password; the user's name stays."""
    bare = LOGIN.sub(r"\1@", address)
    head, mark, query = bare.partition("?")
    kept = []
    for part in query.split("&") if mark else []:
        key, _, value = part.partition("=")
        if key.lower() == "odbc_connect":
            kept.append(f"{key}={quote_plus(ODBC_SECRET.sub('', unquote_plus(value)))}")
        elif not SECRET.match(part):
            kept.append(part)
    return head + ("?" + "&".join(kept) if kept else "")


def without_passwords(document: Any) -> Any:
    """Return a JSON document with the passwords of its addresses left out."""
    if isinstance(document, dict):
        return {key: without_passwords(value) for key, value in document.items()}
    if isinstance(document, list):
        return [without_passwords(value) for value in document]
    return without_password(document) if isinstance(document, str) and "://" in document else document


def without_login(address: str) -> str:
    """Return an address without user and password."""
    return re.sub(r"(://)[^@/?]*@", r"\1", without_password(address))


def is_sqlite(address: str) -> bool:
    """True if an address is that of an SQLite database, which only this machine should open."""
    return address.startswith(("sqlite:", "sqlite+"))


def sqlite_file(address: str) -> Path | None:
    """Return the file of an SQLite address, absolute and with ~ expanded; None for every other address.

    As SQLAlchemy reads it, %XX is the character of that code, and parameters follow the first question mark.
    """
    kind, _, rest = address.partition(":///")
    name = unquote(rest.partition("?")[0])
    if not is_sqlite(f"{kind}:") or not name or name.startswith((":memory:", "file:")):
        return None
    return Path(name).expanduser().absolute()


def sqlite_address(file: Path) -> str:
    """Return the address of an SQLite file."""
    name = str(file.absolute())
    quoted = name.replace("%", "%25").replace("?", "%3F")
    # MLflow makes the folder of a plain address, without reading %XX.
    return f"{'sqlite' if quoted == name else 'sqlite+pysqlite'}:///{quoted}"


def lasting(address: str) -> str:
    """Return an address that holds in every working directory."""
    address = address.strip()
    file, (_, mark, parameters) = sqlite_file(address), address.partition("?")
    return address if file is None else sqlite_address(file) + mark + parameters


def login_of(address: str) -> tuple[str | None, str | None]:
    """Return user and password of an address."""
    found = urlsplit(address)
    user, password = (unquote(part) if part else None for part in (found.username, found.password))
    return user, password
