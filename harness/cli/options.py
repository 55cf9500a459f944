"""Options that several verbs share, and options that a verb takes as one object.

A verb may take a dataclass of options. Each field becomes an option of the command line, at the place of the dataclass
among the parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from harness.cli.names import complete_run, complete_study
from harness.common.validation import with_home

STUDY_HELP = "A study's YAML file, or the name of a submitted study."
StudyArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help=STUDY_HELP, autocompletion=complete_study)
]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run id, or its first digits.", autocompletion=complete_run),
]
RunsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN]...",
        help="Run ids, or their first digits (default: all runs).",
        autocompletion=complete_run,
    ),
]
RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root",
        "-r",
        envvar="SSMSCALE_ROOT",
        help="Folder of the runs (default: the study's root, else ./runs).",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change a key of the study, as training.batch=16; repeatable.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", "-n", help="Check and show what would be done; change nothing.")
]
EveryRunOption = Annotated[bool, typer.Option("--runs", help="Show a row for each run.")]
# Written out, since the laws themselves come with numpy; a test holds this list to theirs.
LawOption = Annotated[
    str,
    typer.Option(
        help="The law to fit: chinchilla (size and tokens), chinchilla_iterations (size and iterations), size, data "
        "(tokens), learning_curve (iterations), data_constrained (repeated data: column unique_tokens), and with one "
        "E for all architectures chinchilla_shared_e, chinchilla_iterations_shared_e, size_shared_e."
    ),
]
DeltaOption = Annotated[
    float | None,
    typer.Option(
        help="Huber delta of the residuals of the log loss; published fits use 0.001 (default: 1.345 robust standard "
        "deviations of the noise)."
    ),
]
ReferenceOption = Annotated[
    str | None, typer.Option(metavar="ARCH", help="Architecture that the others are compared with.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)."),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        "-c",
        envvar="SSMSCALE_CLUSTER",
        metavar="C",
        help="A cluster's profile: a YAML file, or a name in slurm/profiles.",
    ),
]
OnOption = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="WHERE",
        help="local trains here, in the foreground; slurm submits a job for each series and returns; ray packs all "
        "series on the GPUs of one job, or here without --cluster; auto packs series smaller than a node and submits "
        "the others as jobs, or trains here without --cluster.",
    ),
]
YesOption = Annotated[
    bool,
    typer.Option(
        "--yes",
        "-y",
        help="Do not ask before a large submission (the profile's confirm_gpu_hours, else 100).",
    ),
]


@dataclass(frozen=True)
class TargetOptions:
    """Machines that a study is trained on, beside --on."""

    cluster: ClusterOption = None
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            min=1,
            metavar="N",
            help="Most nodes to pack series on (default: as many as series can fill, within the profile).",
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help="With --on ray: use the Ray cluster at http://HOST:8265, ray://HOST:10001 or HOST:6379 (default: "
            "RAY_ADDRESS). Its nodes must see --root and the corpus.",
        ),
    ] = None
    snapshot: Annotated[
        bool | None,
        typer.Option(
            "--snapshot/--no-snapshot",
            help="Run SLURM jobs from a copy of the code as it is now, or from the checkout as it is when they start "
            "(default: as the profile says, else no copy).",
        ),
    ] = None


@dataclass(frozen=True)
class TableOptions:
    """Tables of points in place of a study, their reading, and the choice of rows."""

    points: Annotated[
        list[Path] | None,
        typer.Option(
            "--points",
            metavar="FILE",
            help="Fit a CSV, Parquet or JSON table, or an export of Weights & Biases, in place of a study; repeatable.",
        ),
    ] = None
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="A=B",
            help="Read column A from the table's column B; A==TEXT sets one value for every row, A=@file the file's "
            "name; repeatable.",
        ),
    ] = None
    units: Annotated[
        list[str] | None,
        typer.Option(
            "--unit",
            metavar="A=UNIT",
            help="Multiply column A: n_params=B for a column in billions; k, M, B, T or a number; repeatable.",
        ),
    ] = None
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="CONDITION",
            help="Read only rows with optimizer=adamw, 'lr<=0.001' or 'n_params>=100M', by any column; repeatable.",
        ),
    ] = None
    best: Annotated[
        str | None,
        typer.Option(
            "--best",
            metavar="A,B",
            help="Of runs that differ in settings A and B alone, such as lr,batch, keep those with the lowest loss.",
        ),
    ] = None
    tokens_from: Annotated[
        str | None,
        typer.Option(
            "--tokens-from",
            metavar="CONVENTION",
            help="Compute missing tokens: flops/6n, or flops/6n_non_embedding for sizes without embeddings.",
        ),
    ] = None


@dataclass(frozen=True)
class DesignOptions:
    """Questions of `plan` about the design of a study."""

    design: Annotated[
        bool,
        typer.Option(
            "--design", help="Simulate the study: intervals to expect, and what its grid cannot identify."
        ),
    ] = False
    reference: ReferenceOption = None
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", metavar="GPU_HOURS", help="Propose the best grid for so many further GPU-hours."
        ),
    ] = None
    prior: Annotated[
        Path | None,
        typer.Option(
            "--prior",
            metavar="FIT.json",
            help="Output of `ssmscale fit --json` that --design takes as the truth.",
        ),
    ] = None
    law: Annotated[
        str | None,
        typer.Option(
            "--law", help="Law of the report (default: the prior's, else chinchilla); see `ssmscale fit`."
        ),
    ] = None


def expand_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb whose parameters are the fields of the dataclasses that `verb` takes."""
    kinds: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        if not is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(parameter.annotation, type)
        kinds[parameter.name] = parameter.annotation
        hints = get_type_hints(parameter.annotation, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(parameter.annotation)
        ]

    @wraps(verb)
    def expanded(**given: Any) -> None:
        for name, value in given.items():
            if isinstance(value, Path):  # no shell expands --root=~/runs, or a value of the environment
                given[name] = with_home(value)
            elif isinstance(value, list):
                given[name] = [with_home(one) if isinstance(one, Path) else one for one in value]
        options = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in kinds.items()
        }
        verb(**options, **given)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def named_cluster(context: typer.Context, cluster: str | None) -> str | None:
    """Return the cluster given with --cluster; None if only SSMSCALE_CLUSTER names one."""
    source = context.get_parameter_source("cluster")
    return None if source is not None and source.name == "ENVIRONMENT" else cluster
