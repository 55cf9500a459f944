"""Optuna's storage of a search, opened by the one process that controls it.

A journal file works on any disk as long as one process writes it. The lock file beside it ensures that, and
holder.json names the process to a second one. If a writer was killed, the file may end in half a line and Optuna's own
lock may remain; the holder of our lock removes both.
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

from filelock import Timeout

from harness.common.address import redact
from harness.common.disk import make_folder, write_atomically
from harness.common.process import identify_process
from harness.common.validation import first_line
from harness.record.trust import with_login
from harness.study.tune import Tune
from harness.tracking.store import with_driver
from harness.tuning.space import SearchCase
from ssmttm.errors import InputError
from ssmttm.files import parse_json, read_document
from ssmttm.locks import file_lock

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

JOURNAL = "optuna.log"
OWNER = "ssmscale.owner"
"""Attribute of a trial: the ROOT that trains it, since several ROOTs may share a database."""
ASKING_SECONDS = 2 * 24 * 3600.0
"""Age above which a trial without an owner is abandoned; it spans time zones, which some databases do not store."""


@contextlib.contextmanager
def in_control(folder: Path, name: str) -> Iterator[None]:
    """Make this the one process that tunes a study while the block runs; raises InputError if another process does."""
    make_folder(folder)
    lock, holder = file_lock(folder / "lock", wait=False), folder / "holder.json"
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{name}: is being tuned by {_who(holder)}; wait for its end, or stop it") from None
    try:
        write_atomically(holder, json.dumps({**identify_process(), "t": round(time.time())}) + "\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def owner_of(folder: Path) -> str:
    """Return the id that marks this ROOT's trials of a study, made at the first call; call it under `in_control`."""
    path = folder / "owner"
    if not path.exists():
        write_atomically(path, f"{uuid.uuid4().hex}\n")
    return path.read_text(encoding="utf-8").strip()


def is_ours(trial: FrozenTrial, owner: str, *, shared: bool) -> bool:
    """True if this ROOT may take over a running trial from a controller that was killed.

    All trials of a journal file belong to its ROOT. A trial without an owner in a database belongs to the controller
    that is asking for it; if it stays so for long, that controller was killed and any ROOT may take the trial.
    """
    if not shared:
        return True
    if OWNER in trial.user_attrs:
        return bool(trial.user_attrs[OWNER] == owner)
    began = trial.datetime_start
    return began is not None and (datetime.now(began.tzinfo) - began).total_seconds() > ASKING_SECONDS


def open_journal(folder: Path) -> BaseStorage:
    """Open the storage of a study's searches in a file; call it under `in_control`."""
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    path = folder / JOURNAL
    _mend(path)
    return JournalStorage(JournalFileBackend(str(path)))


def open_database(uri: str, where: str) -> BaseStorage:
    """Open the storage of searches in a database; raises InputError, without its password, where that fails."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return RDBStorage(with_driver(with_login(uri)))
    except (SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
        problem = f"tune.storage: {redact(uri)}: cannot be opened: {first_line(error)}"
        raise InputError(f"{where}: {problem}; write it as postgresql://USER@HOST:PORT/NAME") from error


def open_search(
    storage: BaseStorage, case: SearchCase, tune: Tune, iterations: int, eval_every: int | None
) -> Study:
    """Open the search of one case, or create it."""
    import optuna

    search = optuna.create_study(
        storage=storage,
        study_name=case.name,
        load_if_exists=True,
        direction="minimize",
        pruner=_pruner(tune, iterations, eval_every or iterations),
    )
    # With the same seed a restarted sampler would repeat its first suggestions.
    search.sampler = _sampler(tune, zlib.crc32(case.name.encode()) + len(search.get_trials(deepcopy=False)))
    return search


def startup_trials(tune: Tune) -> int:
    """Return the number of trials that fill the space evenly, before a model of the loss chooses."""
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
    # No trial is pruned in the first quarter of a run: losses differ little while the learning rate warms up.
    return MedianPruner(n_startup_trials=startup_trials(tune) or 4, n_warmup_steps=iterations // 4)


def _mend(path: Path) -> None:
    Path(f"{path}.lock").unlink(missing_ok=True)
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
        os.fsync(file.fileno())


def _who(holder: Path) -> str:
    try:
        held: dict[str, Any] = parse_json(read_document(holder))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["t"]))
        return f"process {held['pid']} on {held['host']} since {since}"
    except (OSError, ValueError, KeyError):
        return "another process"
