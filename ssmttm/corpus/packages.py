"""Find installed packages without importing them, which for some takes seconds."""

import importlib.util
from pathlib import Path

from ssmttm.errors import InputError


def installed_folder(package: str) -> Path:
    """The folder of an installed package; raises InputError that says what to install."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(f"{package} is not installed; `pip install 'ssmscale[audio]'` brings it")
    return Path(found.origin).parent


def installed_version(package: str) -> str:
    """The version of an installed package; raises InputError that says what to install."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{package} is not installed; `pip install 'ssmscale[audio]'` brings it") from None
