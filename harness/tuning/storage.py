"""Optuna's storage of a search, opened by the one process that controls it.

A journal file suits any disk as long as one process writes; the lock beside it names that process for the message to a
second one. A file whose writer was killed may end in half a line or have Optuna's lock left on it: under our lock both
belong to no process, and are cleared away.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from harness.common.disk import make_folder, write_atomically
from harness.common.process import identify_process
from harness.common.validation import first_line
from harness.study.tune import Tune
from harness.tracking.store import redact, with_driver
from harness.tuning.space import SearchCase
from ssmttm.errors import InputError

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

JOURNAL = "optuna.log"
OWNER = "ssmscale.owner"
"""Attribute of a trial: which ROOT trains it. A database may be shared, and what another ROOT trains is not lost."""
ASKING_SECONDS = 2 * 24 * 3600.0
"""Age at which no controller can be asking for a trial without an owner; some databases tell time without its zone."""


@contextlib.contextmanager
def in_control(folder: Path, name: str) -> Iterator[None]:
    """Be the one process that tunes a study while the block runs; raises InputError where another one is."""
    make_folder(folder)
    lock, holder = FileLock(folder / "lock"), folder / "holder.json"
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{name}: is being tuned by {_who(holder)}; wait for its end, or stop it") from None
    try:
        write_atomically(holder, json.dumps({**identify_process(), "t": round(time.time())}) + "\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def owner_of(folder: Path) -> str:
    """Mark of the trials that this ROOT trains of a study, made once; call it in control."""
    path = folder / "owner"
    if not path.exists():
        write_atomically(path, f"{uuid.uuid4().hex}\n")
    return path.read_text(encoding="utf-8").strip()


def is_ours(trial: FrozenTrial, owner: str, *, shared: bool) -> bool:
    """True if a running trial is this ROOT's, so that it may be taken over from a controller that was killed.

    In a file of our own all are. In a database a trial without an owner is of a controller that asks for it now or was
    killed over that: ours once it has been so for long.
    """
    if not shared:
        return True
    whose = trial.user_attrs.get(OWNER)
    if whose is not None:
        return bool(whose == owner)
    began = trial.datetime_start
    return began is not None and (datetime.now(began.tzinfo) - began).total_seconds() > ASKING_SECONDS


def open_journal(folder: Path) -> BaseStorage:
    """The record of a study's searches in a file; call it in control."""
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    path = folder / JOURNAL
    _mend(path)
    return JournalStorage(JournalFileBackend(str(path)))


def open_database(uri: str, where: str) -> BaseStorage:
    """The record of searches in a database; raises InputError where it cannot be opened, never showing its password."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return RDBStorage(with_driver(uri))
    except (SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{where}: tune.storage: {redact(uri)}: cannot be opened: {first_line(error)}; right is "
            "postgresql://USER@HOST:PORT/NAME"
        ) from error


def open_search(
    storage: BaseStorage, case: SearchCase, tune: Tune, iterations: int, eval_every: int | None
) -> Study:
    """The search of one case, begun where there is none."""
    import optuna

    search = optuna.create_study(
        storage=storage,
        study_name=case.name,
        load_if_exists=True,
        direction="minimize",
        pruner=_pruner(tune, iterations, eval_every or iterations),
    )
    # A sampler begun anew with one seed would suggest again what it did before the restart.
    search.sampler = _sampler(tune, zlib.crc32(case.name.encode()) + len(search.get_trials(deepcopy=False)))
    return search


def startup_trials(tune: Tune) -> int:
    """Trials that fill the space evenly before a model of the loss chooses."""
    return min(tune.trials, max(4, 2 * len(tune.search) + 2)) if tune.sampler != "random" else 0


def _sampler(tune: Tune, seed: int) -> BaseSampler:
    from optuna.samplers import GPSampler, RandomSampler, TPESampler

    if tune.sampler == "random":
        return RandomSampler(seed=seed)
    if tune.sampler == "gp":
        return GPSampler(seed=seed, n_startup_trials=startup_trials(tune))
    return TPESampler(seed=seed, n_startup_trials=startup_trials(tune), multivariate=len(tune.search) > 1)


def _pruner(tune: Tune, iterations: int, eval_every: int) -> BasePruner:
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    if tune.pruner == "none":
        return NopPruner()
    if tune.pruner == "hyperband":
        return HyperbandPruner(min_resource=eval_every, max_resource=iterations)
    # A quarter of a run is let pass: while the learning rate warms up, losses tell little.
    return MedianPruner(n_startup_trials=startup_trials(tune) or 4, n_warmup_steps=iterations // 4)


def _mend(path: Path) -> None:
    Path(f"{path}.lock").unlink(missing_ok=True)
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


def _who(holder: Path) -> str:
    try:
        held: dict[str, Any] = json.loads(holder.read_bytes())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["t"]))
        return f"process {held['pid']} on {held['host']} since {since}"
    except (OSError, ValueError, KeyError):
        return "another process"
