"""`ssmscale serve`: MLflow's tracking and page on a database, as long as the command runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from harness.cli.options import JsonOption, RootOption, StudyArgument
from harness.common.console import errors, print_json, print_line, stoppable
from harness.record.registry import place_of
from harness.tracking import server as serving


def serve(
    study: StudyArgument,
    root: RootOption = None,
    database: Annotated[
        str | None,
        typer.Option(
            envvar="SSMSCALE_DATABASE",
            metavar="URI",
            help="Database of the runs: postgresql://USER@HOST/NAME (default: ROOT/mlflow.db). Keep its password in "
            "the variable or in ~/.pgpass.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 listens on all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 5000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name of the server, such as a proxy's; repeatable."),
    ] = None,
    show_password: Annotated[bool, typer.Option("--show-password", help="Print the password too.")] = False,
    without_login: Annotated[
        bool,
        typer.Option("--open", help="Ask for no login: for a container that its own network shields."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run MLflow's tracking server, behind a login, until Ctrl-C.

    Prints the page's address, and the environment variables that jobs need. Page and jobs need the login, also on this
    machine: its user is ssmscale, its password is in ROOT/serve/password.
    """
    loaded, place = place_of(study, root)
    log = place.study(loaded.name) / "logs" / "mlflow-server.log"
    if serving.password_on_show(database):
        errors.print(
            "every user of this machine can read the password in --database; put it in SSMSCALE_DATABASE or ~/.pgpass"
        )
    try:
        with (
            stoppable(),
            serving.serving(
                place, database, host, port, allow_host or (), log, without_login=without_login
            ) as (server, process),
        ):
            if without_login:
                errors.print(
                    "--open: NO LOGIN. Every user and program that reaches this server can read, change and delete "
                    "its runs and their files"
                )
            if as_json:
                print_json(serving.describe(server, loaded.name, show_password=show_password))
            else:
                for line in serving.lines(server, show_password=show_password):
                    print_line(line)
            sys.stdout.flush()
            if loaded.tracking.uri not in {None, server.address}:
                errors.print(f"study {loaded.name} names another server in tracking.uri, which its runs use")
            serving.stay(server, process)
    except KeyboardInterrupt:
        errors.print("stopped")
