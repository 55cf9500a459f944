"""`ssmscale serve`: MLflow's server on a database, for as long as the command runs."""

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
            help="Keep runs there: postgresql://USER@HOST/NAME (default: ROOT/mlflow.db). A password is hidden best in "
            "the variable, or in ~/.pgpass.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own asks users for a password.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 5000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further name it is called by, as of a proxy; may be repeated."),
    ] = None,
    show_password: Annotated[bool, typer.Option("--show-password", help="Print the password, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """MLflow's server and page on a database, until Ctrl-C; prints what jobs need to find it."""
    loaded, place = place_of(study, root)
    log = place.study(loaded.name) / "logs" / "mlflow-server.log"
    if serving.password_on_show(database):
        errors.print(
            "every user here can read a command line's password; SSMSCALE_DATABASE or ~/.pgpass hides it"
        )
    try:
        with (
            stoppable(),
            serving.serving(place, database, host, port, allow_host or (), log) as (server, process),
        ):
            if as_json:
                print_json(serving.describe(server, loaded.name, show_password=show_password))
            else:
                for line in serving.lines(server, show_password=show_password):
                    print_line(line)
            sys.stdout.flush()
            if loaded.tracking.uri not in {None, server.address}:
                errors.print(f"study {loaded.name} has a tracking.uri of its own, which goes first")
            serving.stay(server, process)
    except KeyboardInterrupt:
        errors.print("stopped")
