"""Who may use an MLflow server that others can reach: one user, a password made here, files nobody else can read."""

from __future__ import annotations

import os
import secrets
import shlex
import uuid
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

USER = "ssmscale"


@dataclass(frozen=True)
class Credentials:
    """What MLflow's basic-auth app is started with, and where a client finds the same."""

    user: str
    password_file: Path
    secret_file: Path
    """Key of the server's forms, the same after a restart."""
    config_file: Path

    @property
    def password(self) -> str:
        """The password itself; whoever shows it was asked to."""
        return self.password_file.read_text(encoding="utf-8").strip()

    def server_environment(self) -> dict[str, str]:
        """What MLflow's server reads: an environment is its owner's alone, a command line everybody's."""
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
                _write_private(path, secrets.token_urlsafe(24) + "\n")
        users = folder / "auth.db"
        os.close(os.open(users, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite keeps the mode of a file it finds
        _write_private(made.config_file, _config(users))
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


def _write_private(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with os.fdopen(
        os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
