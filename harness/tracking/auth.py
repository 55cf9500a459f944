"""The login of an MLflow server that other machines can reach: one user and a generated password."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from harness.common.disk import write_atomically

USER = "ssmscale"


@dataclass(frozen=True)
class Credentials:
    """User and files of MLflow's basic-auth app; only their owner can read the files."""

    user: str
    password_file: Path
    secret_file: Path
    """Key of the server's forms, the same after a restart."""
    config_file: Path

    @property
    def password(self) -> str:
        """The password; shown only at the user's request."""
        return self.password_file.read_text(encoding="utf-8").strip()

    def server_environment(self) -> dict[str, str]:
        """Return the server's environment, which only its owner can see; every user can see a command line."""
        return {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.config_file),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.user,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.secret_file.read_text(encoding="utf-8").strip(),
        }


def make_credentials(folder: Path) -> Credentials:
    """Create the missing files under `folder`, all of mode 0600; existing ones stay as they are."""
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
        database = str(users).replace("%", "%%")  # configparser interpolates a single %
        config = (
            "[mlflow]\n"
            "default_permission = NO_PERMISSIONS\n"
            f"database_uri = sqlite:///{database}\n"
            f"admin_username = {USER}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        write_atomically(made.config_file, config, mode=0o600)
        for path in (made.password_file, made.secret_file, users):
            path.chmod(0o600)
    return made
