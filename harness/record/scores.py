"""Results of evaluating finished Runs and their table: one file for each way of evaluating a Run.

    ROOT/runs/RUN/evaluation/held-out.json   cross-entropy and perplexity on the held-out split, from the final weights
    ROOT/runs/RUN/evaluation/SETTINGS.json   scores of generated audio; SETTINGS is a digest of the settings

Two values are comparable only if metric and settings are equal. A metric's name includes its embedding model and the
first digits of that model's fingerprint (`fd_clap-1a2b3c4d`).
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
"""Name of the evaluation that needs no generation: the loss on the held-out split."""


class Settings(Frozen):
    """Settings of generation and of the reference it is compared with."""

    prompts: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 over the captions in their order."""
    n_prompts: Count
    frames: Count
    """Frames generated for each prompt."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    top_k: Count | None
    """Number of codes sampled from; None samples from all."""
    guidance: Annotated[float, Field(allow_inf_nan=False)]
    """Weight of classifier-free guidance; 1 is none."""
    seed: WholeNumber
    reference: str
    """Description of the reference."""
    reference_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 over the content of the reference."""

    @property
    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of all fields."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def generation_digest(self) -> str:
        """Digest of all fields but the reference: Runs need no new audio while it is equal."""
        return digest_of(self.model_dump(mode="json", exclude={"reference", "reference_digest"}))


Metric = Annotated[str, Field(pattern=r"^[a-z0-9_]+(-[a-z0-9]+)?$", max_length=100)]
"""Name of a metric with the first digits of its model's fingerprint; also a column's name and a name in MLflow."""


class Score(Frozen):
    """One value of one metric."""

    value: Finite
    t: Seconds
    """Time of the measurement, which trackers get with the value."""


class Evaluation(Frozen):
    """One file of results."""

    settings: Settings | None = None
    """None for the held-out loss."""
    n_prompts: Count
    """Number of prompts, or of held-out clips where nothing was generated."""
    scores: dict[Metric, Score] = {}
    notes: tuple[str, ...] = ()
    """Limits to the meaning of a score, a sentence each."""

    @property
    def name(self) -> str:
        """Name of its file, and the rows' `settings`."""
        return HELD_OUT if self.settings is None else self.settings.digest


@dataclass(frozen=True)
class EvaluationRow:
    """One metric of one Run; its identity is (run_id, metric, settings).

    Lower is better for `ce`, `ppl` (held-out nats a token and their exponential), `ce_K`, `ppl_K` (of codebook K),
    `fd_MODEL-FP`, `fd_mel_proxy-FP` (Frechet distances) and `kl_softmax_MODEL-FP`; higher is for `clap_score-FP`.
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


COLUMNS = [field.name for field in fields(EvaluationRow)]


def evaluation_rows(resolved: ResolvedStudy) -> list[EvaluationRow]:
    """Return every result of a study's finished Runs in the grid's order; raises InputError naming a damaged file."""
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
    """Return the folder of the evaluations of one Run."""
    return root.run(run_id) / "evaluation"


def evaluations_of(root: Root, run_id: str, *, check_names: bool = False) -> Iterator[Evaluation]:
    """Read the results of one Run, a file each, by name.

    Raises InputError for a damaged file, and with `check_names` for one not named after its settings, such as a copy.
    """
    for path in sorted(evaluation_folder(root, run_id).glob("*.json")):
        found = read_model(path, Evaluation)
        if check_names and path.stem != found.name:
            raise InputError(f"{path}: holds results for the settings {found.name}; rename or remove it")
        yield found


def held_evaluation(root: Root, run_id: str, name: str) -> Evaluation | None:
    """Read the results of one Run for the settings of that name, None if there are none."""
    return read_model_if_there(evaluation_folder(root, run_id) / f"{name}.json", Evaluation)


def keep_evaluation(root: Root, run_id: str, evaluation: Evaluation) -> None:
    """Write the results of one Run to the file of their settings; raises DiskFull."""
    write_model(evaluation_folder(root, run_id) / f"{evaluation.name}.json", evaluation)


def as_csv(rows: Iterable[EvaluationRow]) -> str:
    """Return the table as CSV."""
    file = io.StringIO(newline="")
    write_csv(rows, EvaluationRow, file)
    return file.getvalue()
