"""Evaluation of finished Runs: the held-out loss of their final weights, and scores of generated clips.

The tokens of each setting are generated once and kept, as are the small arrays that each measure computes from a clip.
So nothing is computed again after a kill, and a measure added later needs no generation. The results of a Run are
written once they are complete. One process at a time evaluates a Run; others go on with the next.

    ROOT/runs/RUN/evaluation/GENERATED/codes, .../MEASURE    tokens and arrays of generated clips
    ROOT/evaluation/REFERENCE/MEASURE                        arrays of reference clips, shared by all Runs
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import Timeout

from harness.common.disk import make_folder, naming_a_full_disk
from harness.common.format import counted
from harness.evaluate.model import Trained, load_trained
from harness.record.registry import ResolvedStudy
from harness.record.root import Layout
from harness.record.scores import (
    HELD_OUT,
    Evaluation,
    Score,
    Settings,
    evaluation_folder,
    held_evaluation,
    keep_evaluation,
)
from harness.study.run import Precision
from ssmttm.codec.base import Audio, Codec
from ssmttm.corpus.dataset import TokenDataset
from ssmttm.device import usable_device
from ssmttm.errors import InputError
from ssmttm.evaluation.measure import Measure, Scores
from ssmttm.evaluation.mel_proxy import MelProxy
from ssmttm.evaluation.row_store import RowStore
from ssmttm.evaluation.sets import PromptSet, choose_prompts
from ssmttm.locks import file_lock

Say = Callable[[str], None]
ClipsOf = Callable[[Sequence[int]], tuple[list[Audio], int]]


@dataclass(frozen=True)
class Request:
    """Prompts, reference, sampling and models of an evaluation."""

    prompts: Path | None = None
    """Caption file; None takes the held-out captions."""
    reference: Path | None = None
    """Folder of recordings; None takes the held-out clips, decoded."""
    limit: int | None = None
    """Largest number of prompts."""
    temperature: float = 1.0
    top_k: int | None = 250
    guidance: float = 3.0
    seed: int = 0
    clap: str | None = None
    """Folder or hub name of a CLAP model."""
    tagger: str | None = None
    """Folder or hub name of an audio tagger."""
    device: str = "cpu"
    batch: int = 16
    """Prompts generated, decoded and measured at once."""


@dataclass(frozen=True)
class Evaluated:
    """One Run's evaluation."""

    run_id: str
    outcome: Literal["evaluated", "kept", "busy", "impossible"]
    """`kept` if all results existed, `busy` if another process evaluates the Run."""
    reason: str | None = None
    """Reason of a busy or impossible evaluation."""
    notes: tuple[str, ...] = ()
    """Limits of its scores."""


class Evaluator:
    """Evaluates Runs of one study under one request; raises InputError if the request names something missing."""

    def __init__(
        self,
        resolved: ResolvedStudy,
        request: Request,
        say: Say = lambda _: None,
        warn: Say = lambda _: None,
    ) -> None:
        from ssmttm.generation import Sampling

        self.root, self.request, self.say, self.warn = resolved.root, request, say, warn
        self.frames = resolved.corpus.frames
        self.sampling = Sampling(request.temperature, request.top_k, guidance=request.guidance)
        usable_device(request.device)
        path = resolved.study.corpus.path
        self.data = TokenDataset(path, "valid")
        if self.data.manifest.fingerprint != resolved.corpus.fingerprint:
            raise InputError(
                f"{resolved.where}: corpus.path: {path}: not the corpus the runs were trained on"
            )
        self.measures: list[Measure] = [MelProxy(self.data.manifest.codec.sample_rate)]
        self.skipped: dict[str, str] = {}
        """Metrics that are not measured, with the reasons."""
        memory, device = self.root.path / "evaluation", request.device
        if request.clap is None:
            why = "name a CLAP model, such as laion/larger_clap_music, or its folder, with --clap"
            self.skipped |= {"fd_clap": why, "clap_score": why}
        else:
            from ssmttm.evaluation.clap import Clap

            self.measures.append(Clap(request.clap, memory, device))
        if request.tagger is None:
            why = "name an AST model, such as MIT/ast-finetuned-audioset-10-10-0.4593, or its folder, with --tagger"
            self.skipped["kl_softmax_ast"] = why
        else:
            from ssmttm.evaluation.tagger import AstTagger

            tagger = AstTagger(request.tagger, memory, device)
            if self.prompts.paired:
                self.measures.append(tagger)
            else:
                why = "no recordings belong to the prompts; name them with --reference"
                self.skipped["kl_softmax_ast"] = why

    @cached_property
    def prompts(self) -> PromptSet:
        """Prompts and the reference to compare with."""
        request = self.request
        return choose_prompts(self.data, self.frames, request.prompts, request.reference, request.limit)

    @cached_property
    def settings(self) -> Settings:
        """Settings of the results; their digest names the file."""
        return Settings(
            prompts=self.prompts.digest,
            n_prompts=len(self.prompts.captions),
            frames=self.frames,
            temperature=self.request.temperature,
            top_k=self.request.top_k,
            guidance=self.request.guidance,
            seed=self.request.seed,
            reference=self.prompts.reference.what,
            reference_digest=self.prompts.reference.digest,
        )

    def evaluate(self, run_id: str) -> Evaluated:
        """Compute the missing scores of one Run; raises DiskFull."""
        folder = evaluation_folder(self.root, run_id)
        make_folder(folder)
        try:
            lock = file_lock(folder / "lock", wait=False).acquire()
        except Timeout:
            return Evaluated(run_id, "busy", "another process evaluates it")
        with lock, naming_a_full_disk(folder):
            return self._evaluate(run_id)

    def _evaluate(self, run_id: str) -> Evaluated:
        settings = self.settings
        loss = held_evaluation(self.root, run_id, HELD_OUT)
        held = held_evaluation(self.root, run_id, settings.digest) or Evaluation(
            settings=settings, n_prompts=settings.n_prompts
        )
        wanted = [one for one in self.measures if not set(one.metrics) <= set(held.scores)]
        if loss is not None and not wanted:
            return Evaluated(run_id, "kept", notes=held.notes)
        try:
            trained = load_trained(self.root, run_id, self.request.device)
        except InputError as error:
            return Evaluated(run_id, "impossible", str(error))
        if loss is None:
            self.say(f"{run_id}: held-out loss")
            clips, scores = held_out_scores(trained)
            keep_evaluation(self.root, run_id, Evaluation(n_prompts=clips, scores=_timed(scores)))
        if not wanted:
            return Evaluated(run_id, "evaluated")
        try:
            codec = trained.codec
        except InputError as error:
            return Evaluated(run_id, "impossible", f"its tokens cannot be decoded: {error}")
        for scores_of in self._compare(trained, codec, wanted):
            values = held.scores | _timed(scores_of.values)
            notes = tuple(dict.fromkeys([*held.notes, *scores_of.notes]))
            held = held.model_copy(update={"scores": values, "notes": notes})
        keep_evaluation(self.root, run_id, held)
        return Evaluated(run_id, "evaluated", notes=held.notes)

    def _compare(self, trained: Trained, codec: Codec, wanted: Sequence[Measure]) -> Iterator[Scores]:
        run_id, n = trained.run.run_id, len(self.prompts.captions)
        kept = evaluation_folder(self.root, run_id) / self.settings.generation_digest
        codes = RowStore(kept / "codes", self.warn)
        self._generate(trained, codes, n)

        def generated(items: Sequence[int]) -> tuple[list[Audio], int]:
            return list(codec.decode(codes.read(items)["codes"].astype(np.uint16))), codec.facts.sample_rate

        mine = {one: RowStore(kept / one.key, self.warn) for one in wanted}
        self._measure(mine, n, generated, f"{run_id}: measuring")
        with self._reference(wanted, codec) as theirs:
            for one in wanted:
                yield one.score(mine[one].read(), theirs[one].read(), self.prompts.captions)

    def _generate(self, trained: Trained, codes: RowStore, n: int) -> None:
        from ssmttm.generation import generate

        missing = codes.missing(n)
        for items in _in_batches(missing, self.request.batch):
            self.say(
                f"{trained.run.run_id}: generating, {n - len(missing) + missing.index(items[0])} of {n} prompts"
            )
            text = trained.read([self.prompts.captions[i] for i in items])
            seeds = [_prompt_seed(self.request.seed, i) for i in items]
            made = generate(trained.model, text, self.frames, self.sampling, seeds)
            codes.add(items, {"codes": made.cpu().numpy().astype(np.uint16)})

    @contextmanager
    def _reference(self, wanted: Sequence[Measure], codec: Codec) -> Iterator[Mapping[Measure, RowStore]]:
        """Yield the measures' arrays of the reference; one process at a time computes missing ones."""
        reference = self.prompts.reference
        folder = self.root.path / "evaluation" / self.settings.reference_digest[:16]
        make_folder(folder)
        with file_lock(folder / "lock"):
            theirs = {one: RowStore(folder / one.key, self.warn) for one in wanted}
            self._measure(
                theirs, len(reference), lambda items: reference.clips(items, codec), "the reference"
            )
            yield theirs

    def _measure(self, stores: Mapping[Measure, RowStore], n: int, clips_of: ClipsOf, what: str) -> None:
        """Fill the measures' stores; decode each clip once for all that lack it."""
        lacking = {one: set(store.missing(n)) for one, store in stores.items()}
        due = sorted(set().union(*lacking.values()))
        for items in _in_batches(due, self.request.batch):
            self.say(f"{what}, {n - len(due) + due.index(items[0])} of {n} clips")
            clips, rate = clips_of(items)
            for one, store in stores.items():
                mine = [k for k, item in enumerate(items) if item in lacking[one]]
                if mine:
                    store.add([items[k] for k in mine], one.rows([clips[k] for k in mine], rate))

    @property
    def notes(self) -> list[str]:
        """Notes on the prompts, a sentence each."""
        left = self.prompts.left_out
        return [f"left out: {counted(left, 'prompt')} without a recording in the reference"] if left else []


def held_out_scores(trained: Trained, micro_batch: int | None = None) -> tuple[int, dict[str, float]]:
    """Return the number of held-out clips, and by name the cross-entropy and perplexity, whole and of each codebook.

    With the micro-batch of training, which is the default, the values are those of the journal.
    """
    import torch

    from harness.train.batches import Batches
    from ssmttm.evaluation.likelihood import cross_entropy_sums, likelihood_scores, mean_losses

    run, device = trained.run, trained.model.null_condition.device
    layout = Layout(micro_batch=micro_batch or trained.launch.micro_batch)
    batches = Batches(run, trained.launch, layout, 0, str(device), trained.root.text)
    with torch.autocast(device.type, torch.bfloat16, enabled=run.precision is Precision.BF16):
        totals = cross_entropy_sums(trained.model, batches.held_out())
    clips = min(len(batches.valid), run.eval_clips or len(batches.valid))
    return clips, likelihood_scores(*mean_losses(totals))


def _prompt_seed(seed: int, prompt: int) -> int:
    """Return the seed of one prompt's draws, the same in every batch."""
    digest = hashlib.sha256(f"evaluation/{seed}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _in_batches(items: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _timed(values: Mapping[str, float]) -> dict[str, Score]:
    now = time.time()
    return {name: Score(value=value, t=now) for name, value in values.items()}
