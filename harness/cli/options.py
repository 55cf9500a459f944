"""Arguments and options that several verbs of the command share, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StudyArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="A study's YAML file, or the name it was submitted under.")
]
RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help="Run ids; all runs where none is given.")
]
RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root", envvar="SSMSCALE_ROOT", help="Where runs are kept (default: the study's root, else ./runs)."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the study, such as training.batch=16; may be repeated.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
# Written out, since the laws themselves come with numpy; a test holds this list to theirs.
LawOption = Annotated[
    str,
    typer.Option(
        help="The law to fit: chinchilla (size and tokens), chinchilla_iterations (size and iterations), size, data "
        "(tokens), learning_curve (iterations), data_constrained (repeated data: column unique_tokens), and with one "
        "E for all architectures chinchilla_shared_e, chinchilla_iterations_shared_e, size_shared_e."
    ),
]
DeltaOption = Annotated[float, typer.Option(help="Huber delta on log-loss residuals.")]
ReferenceOption = Annotated[
    str | None, typer.Option(metavar="ARCH", help="Architecture the others are compared with.")
]
DesignOption = Annotated[
    bool,
    typer.Option(
        "--design",
        help="Simulate the study first: what intervals its report will have, and what its grid cannot identify.",
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--budget", metavar="GPU_HOURS", help="Propose the best grid for so many further GPU-hours."
    ),
]
StepBudgetOption = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="GPU_HOURS",
        help="GPU-hours of the next step, shared evenly by architectures; a share has to pay for a run longer than "
        "its warmup.",
    ),
]
PriorOption = Annotated[
    Path | None,
    typer.Option(
        "--prior",
        metavar="FIT.json",
        help="What `ssmscale fit --json` printed of a former study: what --design takes for true.",
    ),
]
DesignLawOption = Annotated[
    str | None,
    typer.Option(
        "--law",
        help="The law the report will fit (default: the prior's, else chinchilla); see `ssmscale fit`.",
    ),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="A=B",
        help="Column B of the table is our column A; A==TEXT is one value for every row.",
    ),
]
PredictOption = Annotated[
    list[str] | None,
    typer.Option(
        "--predict",
        metavar="SIZE:BUDGET",
        help="Predict the loss of SIZE parameters after BUDGET iterations (tokens where the points have no iterations, "
        "or as 300M:2Btokens); may be given several times. Unasked: 2 and 4 times the largest size.",
    ),
]
UnannealedOption = Annotated[
    bool,
    typer.Option(
        "--unannealed",
        help="Fit the points taken mid-run instead, as a set of their own beside the annealed.",
    ),
]
DropOutliersOption = Annotated[
    bool,
    typer.Option(
        "--drop-outliers",
        help="Leave out points far off the law that is fitted to all of them; they are listed with the rule.",
    ),
]
PointsOption = Annotated[
    Path | None,
    typer.Option(
        "--points", metavar="FILE", help="Fit a CSV, Parquet or JSON-lines table instead of a study."
    ),
]
OptionalStudy = Annotated[str | None, typer.Argument(metavar="[STUDY]", help="A study; not with --points.")]
SnapshotOption = Annotated[
    bool | None,
    typer.Option(
        "--snapshot/--no-snapshot",
        help="Whether SLURM's jobs run from a copy of the code as it is now, or from what is there when they start "
        "(default: as the profile says, else no).",
    ),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        envvar="SSMSCALE_CLUSTER",
        metavar="C",
        help="A cluster's profile: a YAML file, or a name in slurm/profiles.",
    ),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="With --on ray: pack on the Ray cluster at http://HOST:8265, ray://HOST:10001 or HOST:6379 (default: "
        "RAY_ADDRESS), whose nodes see --root and the corpus, and return.",
    ),
]
NodesOption = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        min=1,
        metavar="N",
        help="Nodes that series are packed on, as far as they fill them (default: as many as are of use, within the "
        "profile).",
    ),
]
YesOption = Annotated[
    bool,
    typer.Option(
        "--yes",
        help="Do not ask, however many GPU-hours the profile wants confirmed (100 on a Ray cluster, which has none).",
    ),
]


def cluster_said(context: typer.Context, cluster: str | None) -> str | None:
    """The cluster that the user named with --cluster; None where SSMSCALE_CLUSTER alone names one."""
    source = context.get_parameter_source("cluster")
    return None if source is not None and source.name == "ENVIRONMENT" else cluster
