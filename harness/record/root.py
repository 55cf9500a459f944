"""ROOT on disk: where studies, series and runs lie, and the small JSON files in them.

run.json is a Run's canonical JSON and never changes once written; launch.json says how its Series is started here and
is rewritten at each submission. A reader sees the old file or the new one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from harness.common.disk import write_atomically
from harness.common.validation import first_mistake
from harness.record.control import Control
from harness.study.run import Count, Frozen, Positive, Run
from ssmttm.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


class Layout(Frozen):
    """Settings that move floating-point order but not the experiment; outside the run id, journalled by the worker."""

    ranks: Count = 1
    micro_batch: Count = 1
    accumulation: Count = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    threads: Count = 1
    """Threads of each rank's CPU arithmetic, set explicitly because every launcher has another default."""
    activation_checkpointing: bool = False
    """True if blocks are computed again in the backward pass; it moves no loss."""
    kernels: str = "torch"
    """Kernels of the mixers: ssmttm.model.kernels.chosen().name."""


class Launch(Frozen):
    """The start of a Series here: paths and layout, rewritten at each submission, outside identity."""

    corpus: Path
    text_encoder: str | None = None
    """Local folder or hub name of the frozen encoder."""
    control: Path
    """control.jsonl of the study that launched it: where the worker looks for cancellations."""
    dispatcher: str
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch: Count
    """Largest number of sequences a rank takes through the model at once."""
    threads: Count = 1
    activation_checkpointing: bool = False
    log_every: Count = 10
    """Steps between two step events of the journal."""
    checkpoint_every: Count = 1000
    """Steps between two periodic checkpoints."""
    keep_last: Count = 1
    """Newest periodic checkpoints kept; branch points are kept whatever their number."""
    keep_best: bool = False
    """True if the checkpoint with the lowest held-out loss is kept too."""
    eval_every: Count | None = None
    """Trunk steps between two evaluations; null evaluates finished Runs alone."""
    peak_flops: Positive | None = None
    """Peak FLOP/s of a rank's device where known: what MFU is measured against."""
    code: str | None = None
    """State of the code it was submitted with: a record under ROOT/studies/NAME/code."""
    tracking: str | None = None
    """Address that a mirror beside the worker sends to; null where the submitting process mirrors, for SQLite, and for
    one that holds a password."""


class Root:
    """A directory of runs keyed by identity, shared by any number of studies."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, run_id: str) -> Path:
        """Directory of one Run: run.json, journal/, checkpoints/, logs/."""
        return self.path / "runs" / run_id

    def series(self, series_id: str) -> Path:
        """Directory of one Series: series.json, launch.json, journal/, checkpoints/, logs/."""
        return self.path / "series" / series_id

    def study(self, name: str) -> Path:
        """Directory of one study: study.json, control.jsonl."""
        return self.path / "studies" / name

    def control(self, study: str) -> Control:
        """The record of what the command line did to a study."""
        return Control(self.study(study) / "control.jsonl")

    @property
    def text(self) -> Path:
        """Cached embeddings of frozen text encoders, shared by all studies."""
        return self.path / "text"


def read_model(path: Path, kind: type[Model]) -> Model:
    """Read a JSON file of ROOT as `kind`; raises InputError naming the file and the key that is wrong."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise InputError(f"{path}: {first_mistake(error)}") from error


def read_model_if_there(path: Path, kind: type[Model]) -> Model | None:
    """Read a JSON file of ROOT as `kind`, None where there is none; raises what `read_model` raises."""
    return read_model(path, kind) if path.exists() else None


def write_model(path: Path, model: BaseModel, *, exclude_defaults: bool = False) -> None:
    """Write a model as a JSON file of ROOT; raises DiskFull."""
    write_atomically(path, model.model_dump_json(indent=1, exclude_defaults=exclude_defaults) + "\n")


def write_run(root: Root, run: Run) -> Path:
    """Write run.json unless it is there; returns the Run's directory.

    Raises InputError where the directory holds another Run (a damaged or edited file).
    """
    path = root.run(run.run_id) / "run.json"
    if path.exists():
        if read_run(path.parent) != run:
            raise InputError(f"{path}: does not hold the run its directory is named after; move it away")
    else:
        write_atomically(path, json.dumps(run.canonical(), indent=1, sort_keys=True) + "\n")
    return path.parent


def read_run(run_dir: Path) -> Run:
    """The Run of a directory; raises InputError where run.json and the directory's name disagree."""
    run = read_model(run_dir / "run.json", Run)
    if run.run_id != run_dir.name:
        raise InputError(f"{run_dir / 'run.json'}: holds run {run.run_id}, not {run_dir.name}")
    return run


def write_series(root: Root, run: Run) -> Path:
    """Write series.json unless it is there; returns the directory of the Run's Series."""
    path = root.series(run.series_id) / "series.json"
    if not path.exists():
        write_atomically(path, json.dumps(run.series_canonical(), indent=1, sort_keys=True) + "\n")
    return path.parent


def write_launch(root: Root, series_id: str, launch: Launch) -> None:
    """Keep how a Series is to be started here; the newest submission's word counts."""
    write_model(root.series(series_id) / "launch.json", launch)


def read_launch(root: Root, series_id: str) -> Launch:
    """Read how a Series is to be started here."""
    return read_model(root.series(series_id) / "launch.json", Launch)
