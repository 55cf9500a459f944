"""Arguments and options that several verbs share, and options that a verb passes on as one object.

A verb may take a dataclass of options; the command line then has each of its fields, where the dataclass stands among
the parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

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


@dataclass(frozen=True)
class DesignOptions:
    """Questions of `plan` about the design of a study."""

    design: Annotated[
        bool,
        typer.Option(
            "--design",
            help="Simulate the study first: what intervals its report will have, and what its grid cannot identify.",
        ),
    ] = False
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
            help="What `ssmscale fit --json` printed of a former study: what --design takes for true.",
        ),
    ] = None
    law: Annotated[
        str | None,
        typer.Option(
            "--law",
            help="The law the report will fit (default: the prior's, else chinchilla); see `ssmscale fit`.",
        ),
    ] = None
    reference: ReferenceOption = None


def expand_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb whose parameters are the fields of the dataclasses that `verb` takes, as typer reads them."""
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
        options = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in kinds.items()
        }
        verb(**options, **given)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def cluster_said(context: typer.Context, cluster: str | None) -> str | None:
    """Return the cluster that the user named with --cluster; None where SSMSCALE_CLUSTER alone names one."""
    source = context.get_parameter_source("cluster")
    return None if source is not None and source.name == "ENVIRONMENT" else cluster
