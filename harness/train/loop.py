"""The training loop of one Series: along the trunk, out on each branch, back to the branch point, and on.

Batches, learning rate and dropout are functions of (seed, step), so a checkpoint needs weights and optimiser state
alone, and nothing is replayed after an interruption. The first rank writes the journals. Where ranks could decide
differently (where to resume, when to stop), one decides for all.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.common.disk import is_full, size_of
from harness.common.process import print_traceback
from harness.record import checkpoints
from harness.record.checkpoints import Marker, remove_partial
from harness.record.heartbeat import Activity, Heartbeat, written_bytes
from harness.record.journal import Event, Fenced, Journal, read_progress
from harness.record.kinds import ANOTHER_RANKS_SIGNAL, OUT_OF_MEMORY, Kind
from harness.record.result import Result, describe_result
from harness.record.root import Launch, Layout, Root
from harness.record.series import WorkList
from harness.study.run import Run, branch_step, learning_rate, trunk_learning_rate
from harness.train.agreement import Agreement
from harness.train.ahead import Ahead
from harness.train.batches import Batches, MicroBatch, StepBatch, dropout_seed, seed_dropout
from harness.train.checkpoint import Saver, load, save_weights
from harness.train.engine import Engine, Usage
from harness.train.ranks import Ranks
from harness.train.stopping import StopFlag, is_out_of_memory
from ssmttm.errors import InputError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("ssmscale.worker")

LOOK_SECONDS = 0.2
"""Least time between two looks at the disk for cancellations and newer attempts: a slow disk must not delay steps."""


class Outcome(IntEnum):
    """The end of a walk along trunk or branch; of several ranks' outcomes the highest counts."""

    DONE = 0
    CANCELLED = 1
    PREEMPTED = 2
    FENCED = 3


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is not finite, or the loss is far above that of a uniform guess."""


class SeriesTrainer(AbstractContextManager["SeriesTrainer"]):
    """Trains the unfinished Runs of one Series in the order in which they leave the trunk."""

    def __init__(
        self,
        root: Root,
        runs: Sequence[Run],
        launch: Launch,
        ranks: Ranks,
        layout: Layout,
        stop: StopFlag,
        heartbeat: Heartbeat,
        facts: Mapping[str, Any],
        work: WorkList,
    ) -> None:
        self.root, self.launch, self.ranks, self.layout, self.stop = root, launch, ranks, layout, stop
        self.heartbeat = heartbeat
        self.facts = facts  # of a journal's first event: process, layout and device
        self.runs = sorted(runs, key=lambda run: run.iterations)
        self.first = self.runs[0]
        self.folder = root.series(self.first.series_id)
        self.journal: Journal | None = None
        """Journal of the trunk, or of the Run whose branch is in training; None on all ranks but the first."""
        self.checkpoint_folder = self.folder / "checkpoints"
        """Checkpoints of the trunk, or of that Run."""
        # Another process may be embedding the same captions.
        with heartbeat.counting(lambda: (written_bytes(), size_of(root.text))):
            self.batches = Batches(self.first, launch, self.layout, ranks.rank, ranks.device, root.text)
        self._usage = Usage(ranks.device)
        self.engine = Engine(self.first, self.layout, ranks)
        self._ahead = Ahead(self.batches.training_step, ranks.device)
        self._agreement = Agreement(ranks)
        self.work = work
        self._work_state: tuple[int, ...] = ()
        # Iterations of the cancelled Runs: hashing a Run at every step would take 1 % of a small one.
        self._cancelled: set[int] = set()
        self._look_again = 0.0  # by the monotonic clock
        self._measured: tuple[int, float] | None = None
        """Step and held-out loss of the trunk's newest evaluation."""
        self._saver = Saver(ranks, launch, heartbeat)
        self._trunk_journal: Journal | None = None  # of the first rank
        self.step = 0
        """Steps that led to the engine's state."""
        self.on_trunk = True
        """True if that state is the trunk's, False if a branch's."""
        self.tokens = 0
        self._restart_clock()

    def __exit__(self, *_: object) -> None:
        self._ahead.__exit__()
        self.engine.free()

    def train(self, journal: Journal | None) -> Outcome:
        """Train the Series; `journal` is the trunk's, open on the first rank alone.

        Raises Diverged if the trunk diverges; a diverging branch fails alone.
        """
        self.journal = self._trunk_journal = journal

        def remove_incomplete() -> None:
            for folder in (self.folder, *(self.root.run(run.run_id) for run in self.runs)):
                remove_partial(folder / "checkpoints")

        self.ranks.run_on_first(remove_incomplete)
        for run in self.runs:
            outcome = self._to_branch(run)
            if outcome is Outcome.DONE:
                outcome = self._branch(run)
            if outcome >= Outcome.PREEMPTED:
                return outcome
        return Outcome.DONE

    # -- the trunk

    def _to_branch(self, run: Run) -> Outcome:
        """Bring the engine to the step where `run` leaves the trunk, or where its branch was interrupted."""
        branch = branch_step(run.schedule, run.iterations)
        if self.ranks.broadcast(self.ranks.is_first and self._is_cancelled(run), bool):
            return Outcome.CANCELLED
        if self._resume(self.root.run(run.run_id) / "checkpoints", branch + 1, run.iterations):
            self.on_trunk = False
            return Outcome.DONE
        if self._resume(self.checkpoint_folder, 1, branch):
            self.on_trunk = True
        elif not self.on_trunk:
            self.engine.free()
            self.engine = Engine(self.first, self.layout, self.ranks)
            self.step, self.tokens, self.on_trunk = 0, 0, True
        outcome = self._walk(branch, partial(trunk_learning_rate, run.schedule, run.optimiser.lr), run)
        if outcome is Outcome.DONE:
            self._save(branch=True)
        return outcome

    # -- a branch

    def _branch(self, run: Run) -> Outcome:
        """Train a Run from its branch point to its end and write its result; its failure ends no other Run."""
        folder = self.root.run(run.run_id)
        if self.ranks.broadcast(self.ranks.is_first and read_progress(folder).state == Event.FINISHED, bool):
            return Outcome.DONE  # by an older attempt, just before this one fenced it off
        start = Event.STARTED if self.on_trunk else Event.RESUMED
        self.on_trunk = False
        trunk = self.journal, self.checkpoint_folder
        journal = Journal.open(folder) if self.ranks.is_first else None
        self.journal, self.checkpoint_folder = journal, folder / "checkpoints"
        try:
            self._append(start, step=self.step, **self.facts)
            rate = partial(learning_rate, run.schedule, run.optimiser.lr, iterations=run.iterations)
            outcome = self._walk(run.iterations, rate, run)
            if outcome is Outcome.DONE:
                self._finish(run)
            elif outcome is Outcome.CANCELLED:
                self._append(Event.CANCELLED, step=self.step)
            return outcome
        except Diverged as problem:
            self._append(Event.FAILED, step=self.step, reason=str(problem), kind=Kind.DIVERGED)
            return Outcome.DONE
        except (Fenced, InputError):
            raise
        except Exception as problem:
            if (short := is_out_of_memory(problem)) or is_full(problem):  # the run has not failed
                if journal is not None and short:
                    journal.leave(Kind.OUT_OF_MEMORY, OUT_OF_MEMORY)
                elif journal is not None:
                    journal.leave(Kind.DISK_FULL, str(problem))
                raise
            if self.ranks.world > 1:
                raise  # the other ranks are at another step by now
            print_traceback()
            reason = f"{type(problem).__name__}: {problem}"
            self._append(Event.FAILED, step=self.step, reason=reason, kind=Kind.ERROR)
            return Outcome.DONE
        finally:
            if journal is not None:
                journal.close()
            self.journal, self.checkpoint_folder = trunk

    def _finish(self, run: Run) -> None:
        loss, by_codebook = self.evaluate()
        self.heartbeat.move(Activity.SAVE, self.step)
        self._check_state()
        weights = self.engine.state_dict()
        if self.journal is not None and weights is not None:
            self._check_fences()
            with self.heartbeat.counting(written_bytes):
                save_weights(weights, self.checkpoint_folder / "model.safetensors")
            measured = {"loss": loss, "loss_codebooks": by_codebook, "step": self.step, "tokens": self.tokens}
            derived = describe_result(run, self.tokens, self.batches.flops_per_token)
            result = Result.model_validate({**measured, **derived})
            self._append(Event.FINISHED, **result.model_dump(mode="json"))
            log.info("run %s finished after %d iterations: held-out loss %.4f", run.run_id, self.step, loss)
            for old in checkpoints.marked(self.checkpoint_folder):
                checkpoints.remove(self.checkpoint_folder, old.tag)
            remove_partial(self.checkpoint_folder)

    # -- steps

    def _walk(self, target: int, rate: Callable[[int], float], run: Run) -> Outcome:
        """Step until `target`; log, evaluate and save on the way; end early at a signal, a cancellation or a fence."""
        self._restart_clock()
        start = self.step
        while self.step < target:
            outcome = self._agree(run, at_once=self.step == start)
            if outcome is Outcome.PREEMPTED:
                self._save()
                received = self.stop.reason
                reason, kind = received or ANOTHER_RANKS_SIGNAL, Kind.of_signal(received)
                self._append(Event.PREEMPTED, step=self.step, reason=reason, kind=kind)
            if outcome is not Outcome.DONE:
                return outcome
            done = self.step + 1
            batch = self._ahead.take(self.step, target)
            self._take_step(batch, rate(self.step), must_log=done == target and not self.on_trunk)
            # Before saving, so that the checkpoint records the loss and a kill in between does not cost the evaluation.
            if self.on_trunk and self.launch.eval_every and done % self.launch.eval_every == 0:
                loss, by_codebook = self.evaluate()
                self._append(Event.EVAL, step=done, loss=loss, loss_codebooks=by_codebook, tokens=self.tokens)
                self._measured = done, loss
                self._restart_clock()
            if done < target and done % self.launch.checkpoint_every == 0:
                self._save()
        return Outcome.DONE

    def _take_step(self, batch: StepBatch, lr: float, *, must_log: bool) -> None:
        import torch

        from ssmttm.model.loss import codebook_cross_entropy

        seed_dropout(dropout_seed(self.first.seed, self.step, self.ranks.rank), self.ranks.device)
        smoothing = self.first.regularisation.label_smoothing
        shares: list[torch.Tensor] = []

        def share_of(part: MicroBatch) -> torch.Tensor:
            self.heartbeat.move(Activity.STEP, self.step + 1)
            logits = self.engine.deepspeed(part.inputs, part.text)
            sums, _ = codebook_cross_entropy(logits, part.targets, smoothing)
            share: torch.Tensor = sums.sum() / batch.n_targets
            shares.append(share.detach())
            self.heartbeat.go_on()
            return share

        self.engine.step([partial(share_of, part) for part in batch.micro_batches], lr)
        self.step += 1
        self.tokens += batch.n_targets
        is_logged = must_log or self.step == 1 or self.step % self.launch.log_every == 0
        if is_logged:
            loss = float(self._sum_over_ranks(torch.stack(shares).sum()))
            uniform = math.log(self.first.model.vocabulary)
            if not math.isfinite(loss) or loss > 3 * uniform:
                raise self._diverged(f"training loss is {loss:.4g} (a uniform guess has {uniform:.4g})")
        looks = is_logged or self.ranks.device == "cpu"  # a GPU would have to be waited for
        if looks and not math.isfinite(norm := self.engine.worst_grad_norm()):
            raise self._diverged(f"gradient norm is {norm}")
        if is_logged:
            self._log(loss, lr)

    def _log(self, loss: float, lr: float) -> None:
        now = time.monotonic()
        speed = (self.tokens - self._clock_tokens) / max(now - self._clock, 1e-9)
        self._restart_clock()
        fields: dict[str, Any] = {"step": self.step, "loss": loss, "lr": lr, "tokens": self.tokens}
        fields["tokens_per_second"] = round(speed, 1)
        fields["grad_norm"] = self.engine.grad_norm()
        if self.launch.peak_flops is not None:
            flops = self.batches.flops_per_token * speed / self.ranks.world
            fields["mfu"] = round(flops / self.launch.peak_flops, 4)
        self._append(Event.STEP, **fields)
        if self.journal is not None and (used := self._usage.sample()) is not None:
            self._append(Event.SYSTEM, step=self.step, **used)
        log.info("step %d loss %.4f lr %.3g, %.0f tokens/s", self.step, loss, lr, speed)

    def _restart_clock(self) -> None:
        """Measure speed from now on: training steps count, saving and evaluating do not."""
        self._clock, self._clock_tokens = time.monotonic(), self.tokens

    def evaluate(self) -> tuple[float, list[float]]:
        """Return the held-out cross-entropy in nats per token, over all codebooks and of each; collective.

        Raises Diverged if it is not finite: training losses are checked at logged steps alone.
        """
        from ssmttm.evaluation.likelihood import cross_entropy_sums, mean_losses

        self.heartbeat.move(Activity.EVALUATION, self.step)
        self.engine.deepspeed.eval()
        totals = cross_entropy_sums(self.engine.deepspeed, self.heartbeat.along(self.batches.held_out()))
        self.engine.deepspeed.train()
        loss, by_codebook = mean_losses(self._sum_over_ranks(totals))
        if not math.isfinite(loss):
            raise self._diverged(f"held-out loss is {loss}")
        return loss, by_codebook

    def _check_state(self) -> None:
        """Raise Diverged if a weight or a moment is not finite; collective. Nothing that is not is saved."""
        if not self.engine.is_finite():
            raise self._diverged("a weight or a moment of the optimiser is not finite")

    def _diverged(self, what: str) -> Diverged:
        """Return the error to raise for what was seen after this step."""
        folders = dict.fromkeys((self.checkpoint_folder, self.folder / "checkpoints"))
        steps = [held.marker.step for folder in folders for held in checkpoints.marked(folder)]
        newest = max((step for step in steps if step <= self.step), default=0)
        return Diverged(f"{what} after {self.step} steps; `ssmscale retry` goes on from step {newest}")

    # -- between steps

    def _agree(self, run: Run, *, at_once: bool) -> Outcome:
        """Return the highest outcome that any rank had found a step ago, or `at_once` now; DONE goes on."""
        mine = Outcome.PREEMPTED if self.stop.reason else Outcome.DONE
        now = time.monotonic()
        if self.journal is not None and now >= self._look_again:
            self._look_again = now + LOOK_SECONDS
            if self._is_cancelled(run):
                mine = max(mine, Outcome.CANCELLED)
            try:
                self._check_fences()
            except Fenced:
                mine = Outcome.FENCED
        return Outcome(self._agreement.exchange(mine, at_once=at_once))

    def _check_fences(self) -> None:
        """Raise Fenced if a newer attempt has taken over this journal or the trunk's."""
        for journal in (self.journal, self._trunk_journal):
            if journal is not None:
                journal.check_fence()

    def _is_cancelled(self, run: Run) -> bool:
        if (state := self.work.state()) != self._work_state:
            cancelled = self.work.cancelled()
            # Files that have grown since `state` are read again, and others if the list names new ones.
            self._work_state = state if len(state) == len(self.work.state()) else ()
            self._cancelled = {one.iterations for one in self.runs if one.run_id in cancelled}
        return run.iterations in self._cancelled

    def _resume(self, folder: Path, first: int, last: int) -> bool:
        """Load the newest good checkpoint of these steps, on the trunk a later one; False if there is none."""
        self.heartbeat.move(Activity.START, self.step)
        while True:
            lowest = max(first, self.step + 1) if self.on_trunk else first
            found = self._saver.find(folder, lowest, last, self.journal)
            if found is None:
                return False
            load(self.engine, found, self.heartbeat)
            if self.engine.is_finite():
                break
            self._saver.refuse(found, self.journal)
            self.on_trunk = False  # the engine holds what was refused
        self.step, self.tokens = found.marker.step, found.marker.tokens
        log.info("resumed from %s", found.path)
        return True

    def _save(self, *, branch: bool = False) -> None:
        if self.step:
            self.heartbeat.move(Activity.SAVE, self.step)
            self._check_state()
            marker = Marker(
                step=self.step,
                tokens=self.tokens,
                ranks=self.ranks.world,
                zero_stage=self.layout.zero_stage,
                branch=branch,
                loss=self._measured[1] if self._measured and self._measured[0] == self.step else None,
                files={},
            )
            self._saver.save(self.engine, self.checkpoint_folder, marker, self.journal)
        self._restart_clock()

    def _sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        if self.ranks.world > 1:
            import torch

            value = value.to(self.ranks.device)
            torch.distributed.all_reduce(value)
        return value.cpu()

    def _append(self, event: Event, **fields: Any) -> None:
        """Write an event into the journal, on the first rank."""
        if self.journal is not None:
            self.journal.append(event, **fields)
