"""Evaluation of finished Runs: the held-out loss of their final weights, and scores of generated clips.

The tokens of each setting are generated once and kept, as are the small arrays that each measure computes from a clip.
So nothing is computed again after a kill, and a measure added later needs no generation. The results of a Run are
written once they are complete.

Several processes may share the prompts of a Run. A batch is always the same block of consecutive prompts, whichever
process generates it: rounding depends on the rows of a batch, and so no score depends on how the prompts are shared.

    ROOT/runs/RUN/evaluation/GENERATED/codes, .../MEASURE    tokens and arrays of generated clips
    ROOT/evaluation/REFERENCE/MEASURE                        arrays of reference clips, shared by all Runs
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import Timeout

from harness.common.disk import make_folder, naming_a_full_disk
from harness.common.format import counted
from harness.evaluate.model import Trained, load_trained
from harness.evaluate.request import CorpusOfRuns, Evaluated, Request
from harness.record.registry import ResolvedStudy
from harness.record.root import Layout, Root
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
from ssmttm.evaluation.measure import Measure
from ssmttm.evaluation.mel_proxy import MelProxy
from ssmttm.evaluation.row_store import RowStore
from ssmttm.evaluation.sets import PromptSet, choose_prompts
from ssmttm.locks import file_lock

T = TypeVar("T")
Say = Callable[[str], None]
Step = Callable[[int], None]
ClipsOf = Callable[[Sequence[int]], tuple[list[Audio], int]]


WAIT_SECONDS = 1.0
"""Interval between two tries of a lock that another process holds."""


class Evaluator:
    """Evaluates Runs of one corpus under one request; raises InputError if the request names something missing."""

    def __init__(
        self,
        root: Root,
        corpus: CorpusOfRuns,
        request: Request,
        say: Say = lambda _: None,
        warn: Say = lambda _: None,
        step: Step = lambda _: None,
    ) -> None:
        """Prepare an evaluation; `step` is called after every small step with the number of prompts it completed."""
        from ssmttm.generation import Sampling

        self.root, self.request, self.say, self.warn, self.step = root, request, say, warn, step
        self.frames = corpus.frames
        self.sampling = Sampling(request.temperature, request.top_k, guidance=request.guidance)
        usable_device(request.device)
        self.data = TokenDataset(corpus.path, "valid")
        if self.data.manifest.fingerprint != corpus.fingerprint:
            raise InputError(
                f"{corpus.where}: corpus.path: {corpus.path}: not the corpus the runs were trained on"
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

    @classmethod
    def of(
        cls,
        resolved: ResolvedStudy,
        request: Request,
        say: Say = lambda _: None,
        warn: Say = lambda _: None,
    ) -> Evaluator:
        """Return the evaluator of a study."""
        return cls(resolved.root, CorpusOfRuns.of(resolved), request, say, warn)

    def is_evaluated(self, run_id: str) -> bool:
        """Return True if all results of a Run exist."""
        return held_evaluation(self.root, run_id, HELD_OUT) is not None and not self._wanted(run_id)

    def notes_of(self, run_id: str) -> tuple[str, ...]:
        """Return the notes on a Run's scores."""
        held = held_evaluation(self.root, run_id, self.settings.digest)
        return held.notes if held is not None else ()

    def evaluate(self, run_id: str, prompts: range | None = None) -> Evaluated:
        """Compute the missing scores of one Run; raises DiskFull.

        With `prompts` compute the rows of those alone, and the scores if no other prompt is left.
        """
        folder, every = evaluation_folder(self.root, run_id), range(len(self.prompts.captions))
        make_folder(folder)
        if prompts is not None and prompts != every:
            with naming_a_full_disk(folder):
                return self._evaluate(run_id, prompts)
        try:
            with self._locked(folder / "lock", wait=prompts is not None), naming_a_full_disk(folder):
                return self._evaluate(run_id, every)
        except Timeout:
            return Evaluated(run_id, "busy", "another process evaluates it")

    def _wanted(self, run_id: str) -> list[Measure]:
        held = held_evaluation(self.root, run_id, self.settings.digest)
        known = set(held.scores) if held is not None else set()
        return [one for one in self.measures if not set(one.metrics) <= known]

    def _evaluate(self, run_id: str, prompts: range) -> Evaluated:
        """Evaluate the prompts of a Run; its lock is held if these are all."""
        is_whole = len(prompts) == self.settings.n_prompts
        needs_loss = prompts.start == 0 and held_evaluation(self.root, run_id, HELD_OUT) is None
        wanted = self._wanted(run_id)
        if not needs_loss and not wanted:
            self.step(len(prompts))
            return Evaluated(run_id, "kept", notes=self.notes_of(run_id))
        try:
            trained = load_trained(self.root, run_id, self.request.device)
        except InputError as error:
            return Evaluated(run_id, "impossible", str(error))
        lock = evaluation_folder(self.root, run_id) / "lock"
        if needs_loss:
            self.say(f"{run_id}: held-out loss")
            clips, scores = held_out_scores(trained, step=self.step)
            with nullcontext() if is_whole else self._locked(lock):
                if held_evaluation(self.root, run_id, HELD_OUT) is None:
                    keep_evaluation(self.root, run_id, Evaluation(n_prompts=clips, scores=_timed(scores)))
        if not wanted:
            return Evaluated(run_id, "evaluated")
        try:
            codec = trained.codec
        except InputError as error:
            return Evaluated(run_id, "impossible", f"its tokens cannot be decoded: {error}")
        with suppress(Timeout):  # another process computes the reference, and this one generates meanwhile
            self._reference(wanted, codec, wait=False)
        self._add_rows(trained, codec, wanted, prompts)
        with nullcontext() if is_whole else self._locked(lock):
            return self._keep_scores(run_id, codec)

    def _stores(self, run_id: str, measures: Sequence[Measure]) -> tuple[RowStore, dict[Measure, RowStore]]:
        """Return the codes of a Run's clips and the arrays of these measures, as they are on the disk now."""
        kept = evaluation_folder(self.root, run_id) / self.settings.generation_digest
        return RowStore(kept / "codes", self.warn), {
            one: RowStore(kept / one.key, self.warn) for one in measures
        }

    def _add_rows(self, trained: Trained, codec: Codec, wanted: Sequence[Measure], prompts: range) -> None:
        """Generate and measure the clips of these prompts."""
        codes, mine = self._stores(trained.run.run_id, wanted)
        self._generate(trained, codes, prompts)

        def generated(items: Sequence[int]) -> tuple[list[Audio], int]:
            return list(codec.decode(codes.read(items)["codes"].astype(np.uint16))), codec.facts.sample_rate

        self._measure(mine, prompts, generated, f"{trained.run.run_id}: measuring")

    def _keep_scores(self, run_id: str, codec: Codec) -> Evaluated:
        """Write the scores of a Run whose lock is held, unless other processes have rows left to add."""
        wanted, n = self._wanted(run_id), len(self.prompts.captions)
        codes, mine = self._stores(run_id, wanted)
        if any(store.missing(n) for store in (codes, *mine.values())):
            return Evaluated(run_id, "shared", "other tasks have prompts of it left")
        held = held_evaluation(self.root, run_id, self.settings.digest) or Evaluation(
            settings=self.settings, n_prompts=self.settings.n_prompts
        )
        theirs = self._reference(wanted, codec)
        for one in wanted:
            found = one.score(mine[one].read(), theirs[one].read(), self.prompts.captions)
            notes = tuple(dict.fromkeys([*held.notes, *found.notes]))
            held = held.model_copy(update={"scores": held.scores | _timed(found.values), "notes": notes})
            self.step(0)
        keep_evaluation(self.root, run_id, held)
        return Evaluated(run_id, "evaluated", notes=held.notes)

    def _generate(self, trained: Trained, codes: RowStore, prompts: range) -> None:
        from ssmttm.generation import generate

        n, missing = len(self.prompts.captions), codes.missing(prompts)
        self.step(len(prompts) - len(missing))
        for items in in_blocks(missing, self.request.batch):
            first = prompts.stop - len(missing) + missing.index(items[0])
            self.say(f"{trained.run.run_id}: generating, {first} of {n} prompts")
            text = trained.read([self.prompts.captions[i] for i in items])
            seeds = [_prompt_seed(self.request.seed, i) for i in items]
            made = generate(trained.model, text, self.frames, self.sampling, seeds)
            codes.add(items, {"codes": made.cpu().numpy().astype(np.uint16)})
            self.step(len(items))

    def _reference(
        self, wanted: Sequence[Measure], codec: Codec, *, wait: bool = True
    ) -> dict[Measure, RowStore]:
        """Return the measures' arrays of the reference; one process at a time computes missing ones.

        Raises Timeout, unless `wait`, if another process does.
        """
        reference = self.prompts.reference
        folder = self.root.path / "evaluation" / self.settings.reference_digest[:16]
        make_folder(folder)
        with self._locked(folder / "lock", wait=wait):
            theirs = {one: RowStore(folder / one.key, self.warn) for one in wanted}
            clips_of = lambda items: reference.clips(items, codec)  # noqa: E731
            self._measure(theirs, range(len(reference)), clips_of, "the reference")
        return theirs

    def _measure(
        self, stores: Mapping[Measure, RowStore], items: range, clips_of: ClipsOf, what: str
    ) -> None:
        """Fill the measures' stores; decode each clip once for all that lack it."""
        lacking = {one: set(store.missing(items)) for one, store in stores.items()}
        due = sorted(set().union(*lacking.values()))
        for some in in_blocks(due, self.request.batch):
            self.say(f"{what}, {items.stop - len(due) + due.index(some[0])} of {items.stop} clips")
            clips, rate = clips_of(some)
            for one, store in stores.items():
                mine = [k for k, item in enumerate(some) if item in lacking[one]]
                if mine:
                    store.add([some[k] for k in mine], one.rows([clips[k] for k in mine], rate))
            self.step(0)

    @contextmanager
    def _locked(self, path: Path, *, wait: bool = True) -> Iterator[None]:
        """Hold a lock during the block; while another process holds it report steps, or raise Timeout unless `wait`."""
        while True:
            try:
                lock = file_lock(path, wait=False).acquire()
            except Timeout:
                if not wait:
                    raise
                self.step(0)
                time.sleep(WAIT_SECONDS)
            else:
                with lock:
                    yield
                return

    @property
    def notes(self) -> list[str]:
        """Notes on the prompts, a sentence each."""
        left = self.prompts.left_out
        return [f"left out: {counted(left, 'prompt')} without a recording in the reference"] if left else []


def held_out_scores(
    trained: Trained, micro_batch: int | None = None, step: Step = lambda _: None
) -> tuple[int, dict[str, float]]:
    """Return the number of held-out clips, and by name the cross-entropy and perplexity, whole and of each codebook.

    With the micro-batch of training, which is the default, the values are those of the journal.
    """
    import torch

    from harness.train.batches import Batches
    from ssmttm.evaluation.likelihood import cross_entropy_sums, likelihood_scores, mean_losses

    run, device = trained.run, trained.model.null_condition.device
    layout = Layout(micro_batch=micro_batch or trained.launch.micro_batch)
    batches = Batches(run, trained.launch, layout, 0, str(device), trained.root.text)

    def stepping(found: Iterable[T]) -> Iterator[T]:
        for batch in found:
            yield batch
            step(0)

    with torch.autocast(device.type, torch.bfloat16, enabled=run.precision is Precision.BF16):
        totals = cross_entropy_sums(trained.model, stepping(batches.held_out()))
    clips = min(len(batches.valid), run.eval_clips or len(batches.valid))
    return clips, likelihood_scores(*mean_losses(totals))


def _prompt_seed(seed: int, prompt: int) -> int:
    """Return the seed of one prompt's draws, the same in every batch."""
    digest = hashlib.sha256(f"evaluation/{seed}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def in_blocks(items: Sequence[int], size: int) -> Iterator[list[int]]:
    """Divide numbers in ascending order into those below `size`, those below twice `size`, and so on."""
    for _, some in groupby(items, key=lambda item: item // size):
        yield list(some)


def _timed(values: Mapping[str, float]) -> dict[str, Score]:
    now = time.time()
    return {name: Score(value=value, t=now) for name, value in values.items()}
