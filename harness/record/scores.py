"""Results of evaluating finished Runs, and the table of them: one file for each way of evaluating a Run.

    ROOT/runs/RUN/evaluation/held-out.json   cross-entropy and perplexity on the held-out split, from the final weights
    ROOT/runs/RUN/evaluation/SETTINGS.json   scores of generated audio; SETTINGS is a digest of what was generated, how,
                                             and what it was compared with

Two values may be compared where metric and settings are equal and nowhere else. So the name of a metric carries its
embedding model and the first digits of that model's fingerprint (`fd_clap-1a2b3c4d`), and everything else that decides
its value is in the settings.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from harness.common.jsonl import Seconds
from harness.record.points import write_csv
from harness.record.result import Finite
from harness.record.root import Root, read_model, read_model_if_there, write_model
from harness.record.status import RunState, StatusReader
from harness.study.run import Count, Frozen, WholeNumber, digest_of
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from harness.record.registry import ResolvedStudy

HELD_OUT = "held-out"
"""Settings of what needs no generation: the loss on the held-out split."""


class Settings(Frozen):
    """Everything that decides what is generated from a Run and what it is compared with."""

    prompts: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 over the captions in their order."""
    n_prompts: Count
    frames: Count
    """Frames generated for each prompt."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    top_k: Count | None
    """Codes sampled from; None takes all."""
    guidance: Annotated[float, Field(allow_inf_nan=False)]
    """Weight of classifier-free guidance; 1 is none."""
    seed: WholeNumber
    reference: str
    """Description of the reference."""
    reference_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 over that, by content."""

    @property
    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of all fields: names the file, and the rows' `settings`."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def generation_digest(self) -> str:
        """The same without the reference: equal for audio that need not be generated again."""
        return digest_of(self.model_dump(mode="json", exclude={"reference", "reference_digest"}))


Metric = Annotated[str, Field(pattern=r"^[a-z0-9_]+(-[a-z0-9]+)?$", max_length=100)]
"""Name of a metric, and the first digits of its model's fingerprint; it becomes a column and a name in MLflow."""


class Score(Frozen):
    """One value of one metric."""

    value: Finite
    t: Seconds
    """When it was measured, so that a tracker gets the same a second time."""


class Evaluation(Frozen):
    """One file of results."""

    settings: Settings | None = None
    """None for the held-out loss."""
    n_prompts: Count
    """Prompts generated for; clips of the held-out split where nothing was generated."""
    scores: dict[Metric, Score] = {}
    notes: tuple[str, ...] = ()
    """Limits to the meaning of a score, a sentence each."""

    @property
    def name(self) -> str:
        """The rows' `settings`."""
        return HELD_OUT if self.settings is None else self.settings.digest


@dataclass(frozen=True)
class EvaluationRow:
    """One metric of one Run; its identity is (run_id, metric, settings).

    Metrics are `ce`, `ppl` (held-out nats a token and their exponential), `ce_K`, `ppl_K` (of codebook K),
    `fd_MODEL-FP` and `fd_mel_proxy-FP` (Frechet distances) and `kl_softmax_MODEL-FP`, of which lower is better, and
    `clap_score-FP`, of which higher is.
    """

    run_id: str
    architecture: str
    n_params: int
    iterations: int
    seed: int
    metric: str
    value: float
    n_prompts: int
    settings: str
    """Digest of the settings, or held-out."""


COLUMNS = [field.name for field in fields(EvaluationRow)]


def evaluation_rows(resolved: ResolvedStudy) -> list[EvaluationRow]:
    """Return every result of a study's finished Runs, in the order of its grid, then by settings and metric.

    Raises InputError naming a file of results that cannot be read.
    """
    found = []
    for row in StatusReader(resolved.root, resolved.study.name).read(resolved.points):
        if row.state is not RunState.DONE or row.result is None:
            continue
        found += [
            EvaluationRow(
                run_id=row.run_id,
                architecture=row.point.architecture,
                n_params=row.result["n_params"],
                iterations=row.point.run.iterations,
                seed=row.point.run.seed,
                metric=metric,
                value=score.value,
                n_prompts=evaluation.n_prompts,
                settings=evaluation.name,
            )
            for evaluation in evaluations_of(resolved.root, row.run_id)
            for metric, score in sorted(evaluation.scores.items())
        ]
    return found


def evaluation_folder(root: Root, run_id: str) -> Path:
    """Folder of the evaluations of one Run."""
    return root.run(run_id) / "evaluation"


def evaluations_of(root: Root, run_id: str) -> Iterator[Evaluation]:
    """Read the results of one Run, a file each, in the order of their names; raises InputError for a damaged one."""
    for path in sorted(evaluation_folder(root, run_id).glob("*.json")):
        yield read_model(path, Evaluation)


def named_evaluations(root: Root, run_id: str) -> Iterator[Evaluation]:
    """The same; raises InputError for a file, too, that is not named after its settings, such as a copy."""
    for path in sorted(evaluation_folder(root, run_id).glob("*.json")):
        found = read_model(path, Evaluation)
        if path.stem != found.name:
            raise InputError(
                f"{path}: is not what was found under the settings of that name, but of {found.name}"
            )
        yield found


def held_evaluation(root: Root, run_id: str, name: str) -> Evaluation | None:
    """Read one Run's results under those settings; None where there are none."""
    return read_model_if_there(evaluation_folder(root, run_id) / f"{name}.json", Evaluation)


def keep_evaluation(root: Root, run_id: str, evaluation: Evaluation) -> None:
    """Write one Run's results under their settings, the old file or the new one being there."""
    write_model(evaluation_folder(root, run_id) / f"{evaluation.name}.json", evaluation)


def as_csv(rows: Iterable[EvaluationRow]) -> str:
    """The table as CSV."""
    file = io.StringIO(newline="")
    write_csv(rows, EvaluationRow, file)
    return file.getvalue()
