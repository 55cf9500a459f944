"""The login of an MLflow server that other machines can reach: one user and a generated password."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from filelock import FileLock

from harness.common.disk import write_atomically


class Credentials:
    """The user of MLflow's basic-auth app and the files under `folder` that only their owner can read.

    Missing files are created; the password and the key of the server's forms stay the same after a restart.
    """

    user = "ssmscale"

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        self.password_file, self.users_file = folder / "password", folder / "auth.db"
        self._secret_file, self._config_file = folder / "secret-key", folder / "auth.ini"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        database = str(self.users_file).replace("%", "%%")  # configparser interpolates a single %
        config = (
            "[mlflow]\n"
            "default_permission = NO_PERMISSIONS\n"
            f"database_uri = sqlite:///{database}\n"
            f"admin_username = {self.user}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        with FileLock(folder / "lock"):
            for path in (self.password_file, self._secret_file):
                if not path.exists():
                    write_atomically(path, secrets.token_urlsafe(24) + "\n", mode=0o600)
            os.close(os.open(self.users_file, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite keeps a file's mode
            write_atomically(self._config_file, config, mode=0o600)
            for path in (self.password_file, self._secret_file, self.users_file):
                path.chmod(0o600)

    @property
    def password(self) -> str:
        """The password; shown only at the user's request."""
        return self.password_file.read_text(encoding="utf-8").strip()

    def server_environment(self) -> dict[str, str]:
        """Return the server's environment, which only its owner can see; every user can see a command line."""
        return {
            "MLFLOW_AUTH_CONFIG_PATH": str(self._config_file),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.user,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._secret_file.read_text(encoding="utf-8").strip(),
        }
