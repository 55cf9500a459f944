"""ROOT on disk: the folders of studies, series and runs, and their small JSON files."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from harness.common.disk import make_folder, write_atomically, write_new
from harness.common.validation import first_mistake
from harness.record.control import Control
from harness.study.run import Count, Frozen, Positive, Run
from ssmttm.errors import InputError
from ssmttm.files import read_document, share_with_group

Model = TypeVar("Model", bound=BaseModel)


class Layout(Frozen):
    """Settings that change only the order of floating-point operations; no part of the run id, but journalled."""

    ranks: Count = 1
    micro_batch: Count = 1
    accumulation: Count = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    threads: Count = 1
    """CPU threads of each rank, set explicitly because launchers have different defaults."""
    activation_checkpointing: bool = False
    kernels: str = "torch"
    """Kernels of the mixers: ssmttm.model.kernels.chosen().name; a planned layout does not know them."""
    compiled: bool = False
    """True if torch.compile has compiled the blocks."""

    @property
    def fuses_mixers(self) -> bool:
        """True if kernels do the whole work of a mixer, which takes those of mamba-ssm and causal-conv1d."""
        return "," in self.kernels


EXACT = frozenset({"ranks", "micro_batch", "zero_stage", "threads", "kernels", "compiled"})
"""Keys of a layout whose values change floating-point order."""


def layout_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences of two attempts' first events after which losses agree to rounding alone."""

    def facts(started: Mapping[str, Any]) -> dict[str, Any]:
        layout = {key: value for key, value in started.get("layout", {}).items() if key in EXACT}
        device = started.get("device")
        kind = str(device).split(":", maxsplit=1)[0]
        if kind == "cuda":  # the CPU's threads compute no loss there
            layout.pop("threads", None)
        return layout | ({"device": kind} if device else {})

    earlier = facts(before)
    return [
        f"{key} is {value} and was {earlier[key]}"
        for key, value in facts(now).items()
        if earlier.get(key, value) != value
    ]


class Launch(Frozen):
    """Paths and layout that a Series is started with: no part of identity, rewritten at each submission."""

    corpus: Path
    text_encoder: str | None = None
    """Local folder or hub name of the frozen encoder."""
    control: Path
    """control.jsonl of the study that launched it, where the worker finds cancellations."""
    dispatcher: str
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch: Count
    """Largest number of sequences in one forward pass of a rank."""
    threads: Count = 1
    activation_checkpointing: bool = False
    compile: bool | None = None
    """True to compile blocks; null compiles them on GPUs."""
    log_every: Count = 10
    checkpoint_every: Count = 1000
    keep_last: Count = 1
    """Number of periodic checkpoints kept besides all branch points."""
    keep_best: bool = False
    """True if the checkpoint with the lowest held-out loss is kept too."""
    eval_every: Count | None = None
    """Trunk steps between two evaluations; null evaluates only finished Runs."""
    stall_seconds: Positive = 300.0
    """Shortest time without a move of any rank after which the supervisor ends the ranks, to start them again."""
    peak_flops: Positive | None = None
    """Peak FLOP/s of a rank's device, for the MFU."""
    device: Literal["cpu", "cuda"] | None = None
    """Kind of device that the plan counted on; null (of former versions) takes what there is."""
    wait_seconds: Positive | None = None
    """Longest planned time, at the high end, in which ranks wait for another one."""
    code: str | None = None
    """State of the code it was submitted with: a record under ROOT/studies/NAME/code."""
    tracking: str | None = None
    """Address for the mirror beside the worker; null if the submitting process mirrors, for SQLite, and for an address
    with a password."""


class Identity(Frozen):
    """ROOT/root.json: tells a ROOT from others that use the same tracker or database.

    A ROOT that is moved or copied keeps it: to a tracker, a copy and its original are one ROOT, and each ends the runs
    that only the other one trains. Remove the copy's root.json before its first use to make it a ROOT of its own.
    """

    identity: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Root:
    """A directory of runs by their identity, shared by any number of studies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        share_with_group(path)

    def run(self, run_id: str) -> Path:
        """Directory of one Run: run.json, journal/, checkpoints/, logs/."""
        return Path(self.path, "runs", run_id)

    def series(self, series_id: str) -> Path:
        """Directory of one Series: series.json, launch.json, journal/, checkpoints/, logs/."""
        return Path(self.path, "series", series_id)

    def study(self, name: str) -> Path:
        """Directory of one study: study.json, control.jsonl."""
        return self.path / "studies" / name

    def control(self, study: str) -> Control:
        """Log of what the command line did to a study."""
        return Control(self.study(study) / "control.jsonl")

    def identity(self) -> str:
        """Return the ROOT's identity, made at the first call; raises DiskFull, and InputError for a damaged file."""
        path = self.path / "root.json"
        if not path.exists():
            make_folder(self.path)
            write_new(path, Identity(identity=uuid.uuid4().hex).model_dump_json() + "\n")
        return read_model(path, Identity).identity

    @property
    def text(self) -> Path:
        """Cached embeddings of frozen text encoders, shared by all studies."""
        return self.path / "text"


def read_model(path: Path, kind: type[Model]) -> Model:
    """Read a JSON file of ROOT as `kind`; raises InputError naming the file and the wrong key."""
    try:
        return kind.model_validate_json(read_document(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise InputError(f"{path}: {first_mistake(error)}") from error


def read_model_if_there(path: Path, kind: type[Model]) -> Model | None:
    """Read a JSON file of ROOT as `kind`, None if there is none; raises InputError as `read_model` does."""
    return read_model(path, kind) if path.exists() else None


def write_model(path: Path, model: BaseModel, *, exclude_defaults: bool = False) -> None:
    """Write a model as a JSON file of ROOT; raises DiskFull."""
    write_atomically(path, model.model_dump_json(indent=1, exclude_defaults=exclude_defaults) + "\n")


def write_run(root: Root, run: Run) -> Path:
    """Write run.json if it does not exist and return the Run's directory; raises InputError if it holds another Run."""
    path = root.run(run.run_id) / "run.json"
    if path.exists():
        if read_run(path.parent) != run:
            raise InputError(f"{path}: does not hold the run its directory is named after; move it away")
    else:
        write_atomically(path, json.dumps(run.canonical(), indent=1, sort_keys=True) + "\n")
    return path.parent


def read_run(run_dir: Path) -> Run:
    """Read the Run of a directory; raises InputError if run.json and the directory's name disagree."""
    run = read_model(run_dir / "run.json", Run)
    if run.run_id != run_dir.name:
        raise InputError(f"{run_dir / 'run.json'}: holds run {run.run_id}, not {run_dir.name}")
    return run


def write_series(root: Root, run: Run) -> Path:
    """Write series.json if it does not exist and return the directory of the Run's Series."""
    path = root.series(run.series_id) / "series.json"
    if not path.exists():
        write_atomically(path, json.dumps(run.series_canonical(), indent=1, sort_keys=True) + "\n")
    return path.parent


def write_launch(root: Root, series_id: str, launch: Launch) -> None:
    """Write launch.json of a Series, replacing that of an earlier submission."""
    write_model(root.series(series_id) / "launch.json", launch)


def read_launch(root: Root, series_id: str) -> Launch:
    """Read launch.json of a Series."""
    return read_model(root.series(series_id) / "launch.json", Launch)
