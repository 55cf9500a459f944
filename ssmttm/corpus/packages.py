"""Find installed packages without importing them, which takes seconds for some."""

import importlib.util
from pathlib import Path

from ssmttm.errors import InputError

_MISSING = "{} is not installed; install it by `pip install 'ssmscale[audio]'`"


def installed_folder(package: str) -> Path:
    """Return the folder of an installed package; raises InputError if it is missing."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(_MISSING.format(package))
    return Path(found.origin).parent


def installed_version(package: str) -> str:
    """Return the version of an installed package; raises InputError if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(_MISSING.format(package)) from None
