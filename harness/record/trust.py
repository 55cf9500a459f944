"""Trust in other users' files: unless they are trusted, they decide neither what is executed nor where logins go.

A file is believed if this user or root owns it and no one else may write it. The user's own settings,
~/.config/ssmscale/settings.yaml of mode 600, name further users and groups, and addresses with their logins:

    trusted: [anna, "@musiclab"]
    addresses: ["https://me:password@mlflow.example.org", "postgresql://me:password@db.example.org/optuna"]
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import sys
from pathlib import Path

from harness.common.address import has_password, lasting, without_login
from harness.common.disk import write_atomically
from harness.common.validation import read_yaml, validate, yaml_text
from harness.study.run import Frozen
from ssmttm.errors import InputError


class Settings(Frozen):
    """The user's own settings."""

    trusted: tuple[str, ...] = ()
    """Users, and groups with @ before their name, whose files are believed."""
    addresses: tuple[str, ...] = ()
    """Trackers and databases to which logins may be sent, each with its login or without."""


def settings_path() -> Path:
    """Return the path of the user's settings."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "ssmscale" / "settings.yaml"


def read_settings() -> Settings:
    """Read the user's settings, empty without a file; raises InputError if other users may read them."""
    path = settings_path()
    if not path.exists():
        return Settings()
    facts = path.stat()
    if facts.st_uid not in {os.geteuid(), 0} or facts.st_mode & 0o077:
        raise InputError(f"{path}: other users may read or write it; make it yours alone: chmod 600 {path}")
    return validate(Settings, read_yaml(path), str(path))


def doubt(path: Path) -> str | None:
    """Return why a file or folder is not believed, as a clause; None if it is believed or does not exist."""
    if not os.path.lexists(path):
        return None
    for facts in (path.lstat(), path.stat()):
        trusted = () if _is_own(facts) else read_settings().trusted
        owner, group = _user(facts.st_uid), _group(facts.st_gid)
        is_groups = f"@{group}" in trusted
        is_known = facts.st_uid in {os.geteuid(), 0} or owner in trusted
        if not is_known and not (is_groups and facts.st_gid in _groups_of(facts.st_uid)):
            return f"belongs to {owner}"
        if stat.S_ISLNK(facts.st_mode):
            continue
        if facts.st_mode & stat.S_IWOTH:
            return "can be written by every user"
        if facts.st_mode & stat.S_IWGRP and not _is_private_group(facts.st_gid) and not is_groups:
            return f"can be written by group {group}"
    return None


def believe(path: Path, what: str, instead: str) -> None:
    """Raise InputError unless a file is believed: it says `what`, and the user may do `instead`.

    On a terminal the user is asked first whether to trust the owner from now on.
    """
    why = doubt(path)
    if why is None:
        return
    who = _who(path)
    if _asked(f"{path}: {why}, and says {what}. Trust {who} from now on"):
        own = read_settings()
        text = yaml_text({**own.model_dump(mode="json"), "trusted": [*own.trusted, who]})
        write_atomically(settings_path(), text, mode=0o600)
        if doubt(path) is None:
            return
    remedy = "" if why.endswith("every user") else f", or name {who!r} under `trusted` in {settings_path()}"
    raise InputError(f"{path}: {why}, so it does not decide {what}; {instead}{remedy}")


def may_receive_logins(address: str, source: Path) -> bool:
    """True if this user's logins may go to an address that a file of ROOT names.

    The file must be believed, or the address be in the environment or in the user's settings.
    """
    own = (os.environ.get("MLFLOW_TRACKING_URI", ""), os.environ.get("RAY_ADDRESS", ""))
    return lasting(address) in map(lasting, own) or doubt(source) is None or is_listed(address)


def is_listed(address: str) -> bool:
    """True if the user's settings name an address."""
    return without_login(address) in map(without_login, read_settings().addresses)


def with_login(address: str) -> str:
    """Return an address with the login that the user's settings hold for it, if it has no password itself."""
    if has_password(address):
        return address
    held = read_settings().addresses
    return next((own for own in held if without_login(own) == without_login(address)), address)


def _is_own(facts: os.stat_result) -> bool:
    is_others = facts.st_mode & stat.S_IWOTH or (
        facts.st_mode & stat.S_IWGRP and not _is_private_group(facts.st_gid)
    )
    return facts.st_uid in {os.geteuid(), 0} and (stat.S_ISLNK(facts.st_mode) or not is_others)


def _is_private_group(gid: int) -> bool:
    """True if a group is this user's alone, as many systems make one of the user's name; root's is."""
    return gid == 0 or (gid == pwd.getpwuid(os.geteuid()).pw_gid and _group(gid) == _user(os.geteuid()))


def _who(path: Path) -> str:
    """Return the user or group to trust for a file."""
    facts = path.stat()
    if facts.st_mode & stat.S_IWGRP and not _is_private_group(facts.st_gid):
        return f"@{_group(facts.st_gid)}"
    return _user(path.lstat().st_uid)


def _asked(question: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    import typer

    return typer.confirm(question + "?", err=True)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _groups_of(uid: int) -> set[int]:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return set()
    return set(os.getgrouplist(user.pw_name, user.pw_gid))
