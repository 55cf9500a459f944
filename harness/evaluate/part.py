"""The work of one task of an evaluation: some prompts of some Runs, for their scores or for sound files.

The task begins again where it was stopped: rows of arrays and sound files that are there are not made again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from harness.common.validation import validate
from harness.evaluate.evaluator import Evaluator
from harness.evaluate.generate import write_pieces
from harness.evaluate.model import load_trained
from harness.evaluate.request import CorpusOfRuns, Request
from harness.evaluate.sharing import Slice
from harness.record.journal import Event, read_progress
from harness.record.root import Root
from harness.study.run import Count, Frozen, WholeNumber
from harness.train.part import AtWork
from ssmttm.device import best_device
from ssmttm.errors import InputError
from ssmttm.generation import Sampling

log = logging.getLogger("ssmscale.evaluate")


class ScoresOrder(Frozen):
    """Rows of some prompts for the scores of their Runs."""

    makes: Literal["scores"] = "scores"
    whole: str
    """Digest of the larger work, which tasks with other prompts share."""
    root: Path
    corpus: CorpusOfRuns
    request: Request
    """Its device is the worker's to choose."""
    settings: str
    """Digest of the settings, by which a worker finds that the prompts or the reference have changed."""
    slices: tuple[Slice, ...]
    needs: tuple[Path, ...] = ()
    """Other paths that its Runs need, which a container must show."""
    only_finished: bool = False
    """True to leave out Runs that are not finished when the task begins."""


class PiecesOrder(Frozen):
    """Sound files of some prompts of one Run."""

    makes: Literal["pieces"] = "pieces"
    whole: str
    run_dir: Path
    needs: tuple[Path, ...]
    """Other paths that its Run needs, which a container must show."""
    slices: tuple[Slice, ...]
    captions: tuple[str, ...]
    """Captions of its prompts, in the order of its slices."""
    files: tuple[Path, ...]
    """File of each caption."""
    frames: Count
    sampling: Sampling
    seed: WholeNumber
    """Seed of prompt 0; each further one takes the next."""


def work(request: Mapping[str, JsonValue], at_work: AtWork) -> None:
    """Do the work of one task; raises InputError for an order that is wrong or Runs that cannot be evaluated."""
    if request.get("makes") == "pieces":
        _write(validate(PiecesOrder, request, "request"), at_work)
    else:
        _score(validate(ScoresOrder, request, "request"), at_work)


class _Steps:
    """Counts the prompts that are done, and reports them."""

    def __init__(self, at_work: AtWork, prompts: int) -> None:
        self._at_work, self._of, self._done = at_work, prompts + 1, 0

    def __call__(self, prompts: int) -> None:
        self._done += prompts
        self._at_work.moved(min(self._done, self._of - 1), self._of)


def _score(order: ScoresOrder, at_work: AtWork) -> None:
    root, request = Root(order.root), replace(order.request, device=best_device())
    step = _Steps(at_work, sum(len(one.prompts) for one in order.slices))
    evaluator = Evaluator(root, order.corpus, request, log.info, log.warning, step)
    if evaluator.settings.digest != order.settings:
        raise InputError(
            "the prompts or the reference have changed since the task was submitted; repeat the command"
        )
    impossible = []
    for one in order.slices:
        state = read_progress(root.run(one.run_id)).state
        if order.only_finished and state != Event.FINISHED:
            log.warning("run %s: is left out, since it is %s", one.run_id, state or "not trained")
            step(len(one.prompts))
            continue
        ended = evaluator.evaluate(one.run_id, one.prompts)
        log.info("run %s: prompts %d to %d: %s", one.run_id, one.first, one.last - 1, ended.outcome)
        if ended.outcome == "impossible":
            impossible.append(f"run {one.run_id}: {ended.reason}")
    if impossible:
        raise InputError("; ".join(impossible))


def _write(order: PiecesOrder, at_work: AtWork) -> None:
    step = _Steps(at_work, len(order.captions))
    step(0)
    trained = load_trained(Root(order.run_dir.parent.parent), str(order.run_dir), best_device())
    done = 0
    for one in order.slices:
        mine = slice(done, done + len(one.prompts))
        done = mine.stop
        captions, files, seed = order.captions[mine], order.files[mine], order.seed + one.first
        for _ in write_pieces(trained, captions, files, order.frames, order.sampling, seed, anew=False):
            step(1)
