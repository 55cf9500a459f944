"""The login of `ssmscale serve`: one user and a generated password, by HTTP's basic authentication."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
import stat
from pathlib import Path

from harness.common.disk import write_atomically
from ssmttm.errors import InputError
from ssmttm.locks import file_lock

USER = "ssmscale"
SHORTEST = 12
"""Characters that a password has at least; the generated one has 32."""


class Credentials:
    """The user and the password, which stands in a file under `folder` that only its owner can read.

    The file is created if it is missing, and stays as it is after a restart. Raises InputError if the folder or the
    file is a link or another user's, who would know the password, or if the password is short.
    """

    user = USER

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        self.password_file = folder / "password"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(folder, 0o700)
        with file_lock(folder / "lock"):
            if not os.path.lexists(self.password_file):
                write_atomically(self.password_file, secrets.token_urlsafe(24) + "\n", mode=0o600)
            _make_private(self.password_file, 0o600)
        if len(self.password) < SHORTEST:
            raise InputError(
                f"{self.password_file}: the password has fewer than {SHORTEST} characters; delete the file, and "
                "`ssmscale serve` generates another"
            )

    @property
    def password(self) -> str:
        """The password; shown only at the user's request."""
        return read_password(self.password_file)


def read_password(file: Path) -> str:
    """Return the password in a file."""
    return file.read_text(encoding="utf-8").strip()


def is_login(header: bytes, password: str) -> bool:
    """True if the value of an Authorization header is the login; takes equally long for every wrong password."""
    scheme, _, encoded = header.partition(b" ")
    if scheme.lower() != b"basic":
        return False
    try:
        given = base64.b64decode(encoded.strip(), validate=True)
    except binascii.Error:
        return False
    return hmac.compare_digest(given, f"{USER}:{password}".encode())


def _make_private(path: Path, mode: int) -> None:
    """Take the access of other users from a file or folder of this user's; raises InputError for others."""
    facts = path.lstat()
    if not (stat.S_ISDIR(facts.st_mode) or stat.S_ISREG(facts.st_mode)):
        raise InputError(f"{path}: the login needs a file or folder here, not a link; remove it")
    if os.geteuid() not in {0, facts.st_uid}:
        raise InputError(
            f"{path}: belongs to another user, who alone has the login of this ROOT; use that user's server, or "
            "another --root"
        )
    path.chmod(mode)
