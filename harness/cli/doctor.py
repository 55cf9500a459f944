"""`ssmscale doctor`: checks of this machine, and of a cluster if one is named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from harness.cli.options import ClusterOption, JsonOption, RootOption
from harness.common.console import console, errors, print_json
from harness.doctor.machine import Finding, examine_machine, try_program
from harness.record.nodes import forget_node
from harness.record.root import Root


def doctor(
    root: RootOption = None,
    cluster: ClusterOption = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Leave passwords out of the files of ROOT that hold one.")
    ] = False,
    forget: Annotated[
        str | None,
        typer.Option(
            "--forget-node", metavar="NODE", help="Have the studies under ROOT use a repaired node again."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, and a cluster if one is named.

    Prints what works, and what to do about the rest.
    """
    if forget is not None:
        place = root or Path("runs")
        studies = forget_node(Root(place), forget)
        console.print(f"{forget} is used again by {', '.join(studies)}")
        return
    with errors.status("trying what is installed"):
        findings = examine(root or Path("runs"), cluster, fix=fix)
    if as_json:
        print_json({"checks": [finding.model_dump() for finding in findings]})
    else:
        for finding in findings:
            colour = "green" if finding.works else "red" if finding.needed else "yellow"
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            mark = ("ok" if finding.works else "no", colour)
            console.print(Text.assemble(mark, f"  {finding.name}: {finding.found}{remedy}"))
    if any(finding.needed and not finding.works for finding in findings):
        raise typer.Exit(1)


def examine(root: Path, cluster: str | None = None, *, fix: bool = False) -> list[Finding]:
    """Try each part of this machine, and of a cluster if one is named; imports what it tries, which takes seconds."""
    if cluster is not None:
        from harness.doctor.cluster import examine_cluster

        with ThreadPoolExecutor(1) as beside:  # SLURM's programs answer while torch is imported
            of_cluster = beside.submit(lambda: [*examine_cluster(cluster, root)])
            return [*examine_machine(root, fix=fix), *of_cluster.result()]
    findings = [*examine_machine(root, fix=fix)]
    remedy = "nothing to do unless this is a SLURM login node"
    return [*findings, try_program("sbatch", "SLURM commands are here; --cluster C examines them", remedy)]
