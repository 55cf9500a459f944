"""The training loop of one Series: along the trunk, out on each branch, back to where it left, and on.

A step is the same arithmetic wherever it happens: batches, learning rate and dropout are functions of (seed, step),
so a checkpoint holds weights and optimiser state, and nothing has to be replayed after an interruption. The first
rank writes the journals; decisions that could differ between ranks (where to resume, whether to stop) are made
by one and told to all.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from harness.common.disk import is_full
from harness.common.process import print_traceback
from harness.record import checkpoints
from harness.record.checkpoints import remove_partial
from harness.record.control import Control
from harness.record.journal import Event, Fenced, Journal, read_progress
from harness.record.kinds import ANOTHER_RANKS_SIGNAL, OUT_OF_MEMORY, Kind
from harness.record.result import Result, describe_result
from harness.record.root import Launch, Layout, Root
from harness.study.run import Run, branch_step, learning_rate, trunk_learning_rate
from harness.train.batches import Batches, MicroBatch
from harness.train.checkpoint import Saver, load, save_weights
from harness.train.engine import Engine, Usage
from harness.train.ranks import Ranks
from harness.train.stopping import StopFlag, is_out_of_memory
from ssmttm.errors import InputError

log = logging.getLogger("ssmscale.worker")


LOOK_SECONDS = 0.2
"""Between two looks at the disk for what others want: a short step on a slow disk must not wait for it."""


class Outcome(IntEnum):
    """How a walk along trunk or branch ended; the order is the order of precedence between ranks."""

    DONE = 0
    CANCELLED = 1
    PREEMPTED = 2
    FENCED = 3


class Diverged(RuntimeError):
    """The loss is no longer a number, or has left everything it could have learnt behind."""


class SeriesTrainer:
    """Trains the Runs of one Series that are not finished, in the order in which they leave the trunk."""

    def __init__(
        self,
        root: Root,
        runs: Sequence[Run],
        launch: Launch,
        ranks: Ranks,
        layout: Layout,
        stop: StopFlag,
        process: Mapping[str, Any],
    ) -> None:
        self.root, self.launch, self.ranks, self.layout, self.stop = root, launch, ranks, layout, stop
        self.process = process
        self.runs = sorted(runs, key=lambda run: run.iterations)
        self.first = self.runs[0]
        self.folder = root.series(self.first.series_id)
        self.trunk_checkpoints = self.folder / "checkpoints"
        self.batches = Batches(self.first, launch, self.layout, ranks.rank, ranks.device, root.text)
        self.engine = Engine(self.first, self.layout, ranks)
        self.control = Control(launch.control)
        self._control_size = -1
        self._cancelled: set[int] = set()
        """Iterations of the Runs that are cancelled: hashing a Run at every step would take 1 % of a small one."""
        self._look_again = 0.0
        """When the first rank looks again for cancellations and newer attempts (monotonic)."""
        self._usage = Usage(ranks.device)
        self._measured: tuple[int, float] | None = None
        """Step and held-out loss of the newest evaluation on the way."""
        self._saver = Saver(ranks, launch)
        self._trunk_journal: Journal | None = None
        self.step = 0
        """Steps behind the engine's present state."""
        self.on_trunk = True
        """Whether that state is the trunk's, and not that of some branch."""
        self.tokens = 0
        self._restart_clock()

    def train(self, journal: Journal | None) -> Outcome:
        """Train what is missing; `journal` is the trunk's, open on the first rank alone.

        Raises Diverged where the trunk diverges; a branch that does fails alone.
        """
        self._trunk_journal = journal
        folders = [self.folder, *(self.root.run(run.run_id) for run in self.runs)]
        self._saver.clear([folder / "checkpoints" for folder in folders])
        for run in self.runs:
            outcome = self._to_branch(run, journal)
            if outcome is Outcome.DONE:
                outcome = self._branch(run)
            if outcome is Outcome.PREEMPTED or outcome is Outcome.FENCED:
                return outcome
        return Outcome.DONE

    # -- the trunk

    def _to_branch(self, run: Run, journal: Journal | None) -> Outcome:
        """Bring the engine to where `run` leaves the trunk, or to where its branch was interrupted."""
        branch = branch_step(run.schedule, run.iterations)
        if self._is_cancelled(run):
            return Outcome.CANCELLED
        if self._resume(self.root.run(run.run_id) / "checkpoints", branch + 1, run.iterations, journal):
            self.on_trunk = False
            return Outcome.DONE
        here = self.step if self.on_trunk else -1
        if self._resume(self.trunk_checkpoints, max(here + 1, 1), branch, journal):
            self.on_trunk = True
        elif not self.on_trunk:
            self._start_over()

        def rate(step: int) -> float:
            return trunk_learning_rate(run.schedule, run.optimiser.lr, step)

        outcome = self._walk(branch, rate, self.trunk_checkpoints, journal, run, on_trunk=True)
        if outcome is Outcome.DONE:
            self._save(self.trunk_checkpoints, journal, branch=True)
        return outcome

    # -- a branch

    def _branch(self, run: Run) -> Outcome:
        """Take a Run from its branch point to its end and write its result; its failure is its own."""
        folder = self.root.run(run.run_id)
        if self.ranks.broadcast(self.ranks.is_first and read_progress(folder).state == Event.FINISHED):
            return Outcome.DONE  # by an older attempt, in the moment before it was fenced off
        resumed = not self.on_trunk
        self.on_trunk = False
        journal = Journal.open(folder) if self.ranks.is_first else None
        try:
            facts = {**self.process, "layout": self.layout.model_dump(), "device": self.ranks.device}
            _append(journal, Event.RESUMED if resumed else Event.STARTED, step=self.step, **facts)

            def rate(step: int) -> float:
                return learning_rate(run.schedule, run.optimiser.lr, step, run.iterations)

            outcome = self._walk(run.iterations, rate, folder / "checkpoints", journal, run, on_trunk=False)
            if outcome is Outcome.DONE:
                self._finish(run, folder, journal)
            elif outcome is Outcome.CANCELLED:
                _append(journal, Event.CANCELLED, step=self.step)
            return outcome
        except Diverged as problem:
            _append(journal, Event.FAILED, step=self.step, reason=str(problem), kind=Kind.DIVERGED)
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
                raise  # the other ranks are somewhere else now
            print_traceback()
            reason = f"{type(problem).__name__}: {problem}"
            _append(journal, Event.FAILED, step=self.step, reason=reason, kind=Kind.ERROR)
            return Outcome.DONE
        finally:
            if journal is not None:
                journal.close()

    def _finish(self, run: Run, folder: Path, journal: Journal | None) -> None:
        loss, by_codebook = self.evaluate()
        weights = self.engine.state_dict()
        if journal is not None and weights is not None:
            self._check_fences(journal)
            save_weights(weights, folder / "checkpoints" / "model.safetensors")
            measured = {"loss": loss, "loss_codebooks": by_codebook, "step": self.step, "tokens": self.tokens}
            derived = describe_result(run, self.tokens, self.batches.flops_per_token)
            result = Result.model_validate({**measured, **derived})
            journal.append(Event.FINISHED, **result.model_dump(mode="json"))
            log.info("run %s finished after %d iterations: held-out loss %.4f", run.run_id, self.step, loss)
            for old in checkpoints.marked(folder / "checkpoints"):
                checkpoints.remove(folder / "checkpoints", old.tag)
            remove_partial(folder / "checkpoints")

    # -- steps

    def _walk(
        self,
        target: int,
        rate: Callable[[int], float],
        folder: Path,
        journal: Journal | None,
        run: Run,
        *,
        on_trunk: bool,
    ) -> Outcome:
        """Step until `target`, logging, evaluating, saving, and heeding signals, cancellations and fences."""
        self._restart_clock()
        while self.step < target:
            outcome = self._agree(journal, run)
            if outcome is Outcome.PREEMPTED:
                self._save(folder, journal)
                told = self.stop.reason
                reason, kind = told or ANOTHER_RANKS_SIGNAL, Kind.of_signal(told)
                _append(journal, Event.PREEMPTED, step=self.step, reason=reason, kind=kind)
            if outcome is not Outcome.DONE:
                return outcome
            done = self.step + 1
            self._take_step(rate(self.step), journal, must_log=done == target and not on_trunk)
            # Evaluated first, so that the checkpoint knows its loss and no end in between costs the evaluation.
            if on_trunk and self.launch.eval_every and done % self.launch.eval_every == 0:
                loss, by_codebook = self.evaluate()
                _append(
                    journal, Event.EVAL, step=done, loss=loss, loss_codebooks=by_codebook, tokens=self.tokens
                )
                self._measured = done, loss
                self._restart_clock()
            if done < target and done % self.launch.checkpoint_every == 0:
                self._save(folder, journal)
        return Outcome.DONE

    def _take_step(self, lr: float, journal: Journal | None, *, must_log: bool) -> None:
        import torch

        from ssmttm.model.loss import codebook_cross_entropy

        micro_batches, n_targets = self.batches.training_step(self.step)
        torch.manual_seed(_dropout_seed(self.first.seed, self.step, self.ranks.rank))
        smoothing = self.first.regularisation.label_smoothing
        shares: list[torch.Tensor] = []

        def share_of(batch: MicroBatch) -> Callable[[], torch.Tensor]:
            def compute() -> torch.Tensor:
                logits = self.engine.deepspeed(batch.inputs, batch.text)
                sums, _ = codebook_cross_entropy(logits, batch.targets, smoothing)
                share: torch.Tensor = sums.sum() / n_targets
                shares.append(share.detach())
                return share

            return compute

        self.engine.step([share_of(batch) for batch in micro_batches], lr)
        self.step += 1
        self.tokens += n_targets
        if must_log or self.step == 1 or self.step % self.launch.log_every == 0:
            loss = self._sum_over_ranks(torch.stack(shares).sum())
            self._check_loss(loss)
            self._log(journal, loss, lr)

    def _log(self, journal: Journal | None, loss: float, lr: float) -> None:
        now = time.monotonic()
        speed = (self.tokens - self._clock_tokens) / max(now - self._clock, 1e-9)
        self._restart_clock()
        fields: dict[str, Any] = {"step": self.step, "loss": loss, "lr": lr, "tokens": self.tokens}
        fields["tokens_per_second"] = round(speed, 1)
        if (norm := self.engine.grad_norm()) is not None and math.isfinite(norm):
            fields["grad_norm"] = norm
        if self.launch.peak_flops is not None:
            flops = self.batches.flops_per_token * speed / self.ranks.world
            fields["mfu"] = round(flops / self.launch.peak_flops, 4)
        _append(journal, Event.STEP, **fields)
        if journal is not None and (used := self._usage.sample()) is not None:
            journal.append(Event.SYSTEM, step=self.step, **used)
        log.info("step %d loss %.4f lr %.3g, %.0f tokens/s", self.step, loss, lr, speed)

    def _restart_clock(self) -> None:
        """Measure speed from here: over training steps, not over saving and evaluating."""
        self._clock, self._clock_tokens = time.monotonic(), self.tokens

    def _check_loss(self, loss: float) -> None:
        """Raise Diverged for a loss that is not finite, or far above that of knowing nothing."""
        blind = math.log(self.first.model.vocabulary)
        if not math.isfinite(loss) or loss > 3 * blind:
            raise Diverged(
                f"training loss is {loss:.4g} after {self.step} steps (knowing nothing gives {blind:.4g})"
            )

    def evaluate(self) -> tuple[float, list[float]]:
        """Mean cross-entropy in nats a token on the held-out split, and that of each codebook; collective.

        Raises Diverged where it is not a number: between two logged steps nobody else looks.
        """
        import torch

        from ssmttm.evaluation.likelihood import cross_entropy_sums, mean_losses

        self.engine.deepspeed.eval()
        batches = ((one.inputs, one.targets, one.text) for one in self.batches.held_out())
        totals = cross_entropy_sums(self.engine.deepspeed, batches)
        self.engine.deepspeed.train()
        if self.ranks.world > 1:
            totals = totals.to(self.ranks.device)
            torch.distributed.all_reduce(totals)
            totals = totals.cpu()
        loss, by_codebook = mean_losses(totals)
        if not math.isfinite(loss):
            raise Diverged(f"held-out loss is {loss} after {self.step} steps")
        return loss, by_codebook

    # -- between steps

    def _agree(self, journal: Journal | None, run: Run) -> Outcome:
        """What all ranks do next: the gravest thing any of them knows of."""
        mine = Outcome.PREEMPTED if self.stop.reason else Outcome.DONE
        now = time.monotonic()
        if journal is not None and now >= self._look_again:
            self._look_again = now + LOOK_SECONDS
            if self._is_cancelled(run, ask_others=False):
                mine = max(mine, Outcome.CANCELLED)
            try:
                self._check_fences(journal)
            except Fenced:
                mine = Outcome.FENCED
        if self.ranks.world == 1:
            return mine
        import torch

        word = torch.tensor([int(mine)], device=self.ranks.device)
        torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
        return Outcome(int(word.item()))

    def _check_fences(self, journal: Journal) -> None:
        """Raise Fenced where a newer attempt has taken over the journal, or the trunk while this one is on a branch."""
        journal.check_fence()
        if self._trunk_journal is not None:
            self._trunk_journal.check_fence()

    def _is_cancelled(self, run: Run, *, ask_others: bool = True) -> bool:
        if self.ranks.is_first:
            try:
                size = self.control.path.stat().st_size
            except FileNotFoundError:
                size = 0
            if size != self._control_size:
                cancelled = self.control.cancelled()
                self._control_size = size
                self._cancelled = {one.iterations for one in self.runs if one.run_id in cancelled}
        known = run.iterations in self._cancelled
        return bool(self.ranks.broadcast(known)) if ask_others else known

    def _resume(self, folder: Path, lowest: int, highest: int, journal: Journal | None) -> bool:
        """Load the newest good checkpoint with lowest <= step <= highest, if there is one."""
        found = self._saver.find(folder, lowest, highest, journal)
        if found is None:
            return False
        load(self.engine, found)
        self.step, self.tokens = found.marker.step, found.marker.tokens
        log.info("resumed from %s", found.path)
        return True

    def _save(self, folder: Path, journal: Journal | None, *, branch: bool = False) -> None:
        loss = self._measured[1] if self._measured and self._measured[0] == self.step else None
        if self.step:
            self._saver.save(self.engine, folder, self.step, self.tokens, journal, branch=branch, loss=loss)
        self._restart_clock()

    def _start_over(self) -> None:
        """Put the engine back to step 0."""
        self.engine = Engine(self.first, self.layout, self.ranks)
        self.step, self.tokens, self.on_trunk = 0, 0, True

    def _sum_over_ranks(self, value: Any) -> float:
        if self.ranks.world > 1:
            import torch

            torch.distributed.all_reduce(value)
        return float(value)


def _append(journal: Journal | None, event: Event, **fields: Any) -> None:
    if journal is not None:
        journal.append(event, **fields)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step's dropout: a function of the step, so that resuming needs no random state.

    It depends on the layout too, since ranks and micro-batches draw one after the other.
    """
    return int.from_bytes(hashlib.sha256(f"dropout/{seed}/{step}/{rank}".encode()).digest()[:7], "big")
