"""The login of an MLflow server that others can reach: one user, a password made here, files only its owner reads."""

from __future__ import annotations

import os
import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from harness.common.disk import write_atomically

USER = "ssmscale"


@dataclass(frozen=True)
class Credentials:
    """User and files that MLflow's basic-auth app is started with, and where a client finds the same."""

    user: str
    password_file: Path
    secret_file: Path
    """Key of the server's forms, the same after a restart."""
    config_file: Path

    @property
    def password(self) -> str:
        """The password itself; shown only where the user asks for it."""
        return self.password_file.read_text(encoding="utf-8").strip()

    def server_environment(self) -> dict[str, str]:
        """Variables that MLflow's server reads: only its owner sees an environment, every user a command line."""
        return {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.config_file),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.user,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.secret_file.read_text(encoding="utf-8").strip(),
        }

    def export_line(self) -> str:
        """The line a shell runs to give jobs user and password, the latter out of its file."""
        path = shlex.quote(str(self.password_file))
        return f'export MLFLOW_TRACKING_USERNAME={self.user} MLFLOW_TRACKING_PASSWORD="$(cat {path})"'


def make_credentials(folder: Path) -> Credentials:
    """Make what is missing under `folder`, every file of mode 0600; what is there stays as it is."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    with FileLock(folder / "lock"):
        made = Credentials(USER, folder / "password", folder / "secret-key", folder / "auth.ini")
        for path in (made.password_file, made.secret_file):
            if not path.exists():
                write_atomically(path, secrets.token_urlsafe(24) + "\n", mode=0o600)
        users = folder / "auth.db"
        os.close(os.open(users, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite keeps the mode of a file it finds
        write_atomically(made.config_file, _config(users), mode=0o600)
        for path in (made.password_file, made.secret_file, users):
            path.chmod(0o600)
    return made


def _config(users: Path) -> str:
    database = str(users).replace("%", "%%")  # configparser's own sign
    return (
        "[mlflow]\n"
        "default_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{database}\n"
        f"admin_username = {USER}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
