"""Whole studies by `ssmscale submit --on local`: undisturbed, interrupted, short of memory, and two at once."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from harness.train.stopping import GPU_SHARE
from tests.corpora import write_tiny_corpus
from tests.gpu.report import note, verdict
from tests.gpu.sizes import DEVICE, Size
from tests.studies import tiny_study
from tests.waiting import wait_until

PATIENCE = 300.0
LENGTHS = [40, 120]
LOSS_OFF = 0.02
"""Largest difference of losses after an interruption: kernels add in no fixed order."""
SHORT = 0.012
"""Share of an H200 in which 64 clips do not fit at once."""


def studies(size: Size) -> None:
    """Train a study, the same one interrupted, one that is short of memory, and two at once."""
    with TemporaryDirectory() as name:
        write_tiny_corpus(Path(name, "corpus"), clips=96, frames=size.study_frames)
        _whole_and_resumed(Path(name), size)
        _short_of_memory(Path(name), size)
        _two_at_once(Path(name), size)


class Submission:
    """A study of one model of two blocks in a ROOT of its own, submitted in a process of its own."""

    def __init__(
        self,
        folder: Path,
        size: Size,
        name: str,
        architecture: str,
        lengths: list[int],
        batch: int,
        share: float = 1,
    ) -> None:
        self.root, self._folder, self._log = folder / name, folder, folder / f"{name}.log"
        self._environment = {**os.environ, **({GPU_SHARE: str(share)} if share < 1 else {})}
        fields = tiny_study(Path("corpus")) | {
            "name": name,
            "resources": {"checkpoint_every": 20, "micro_batch": batch},
        }
        fields["model"] = {"d_state": size.d_state, "ssm_head_dim": size.head_dim, "head_dim": size.head_dim}
        fields["grid"] |= {"architectures": {architecture: None}, "iterations": lengths}
        fields["grid"]["sizes"] = {"s": {"n_blocks": 2, "d_model": size.d_model}}
        fields["training"] |= {"batch": batch, "precision": "bf16", "optimiser": {"lr": 1e-3}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
        self.start()

    def start(self) -> None:
        """Submit it, or what is left of it."""
        words = ["submit", f"{self.root.name}.yaml", "--on", "local", "--root", str(self.root), "--yes"]
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness", *words],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def end(self) -> None:
        """Return when the command has ended; report the end of its output if it failed."""
        if status := self._process.wait(PATIENCE):
            lines = self._log.read_text(encoding="utf-8").splitlines()
            note(f"{self.root.name}: submit ended with {status}: {' | '.join(lines[-5:])}")

    def values(self, key: str, **where: object) -> list[Any]:
        """Return the values of a key in all events of the journals that have it, the trunk's first."""
        files = [
            f for kind in ("series", "runs") for f in sorted(self.root.glob(f"{kind}/*/journal/*.jsonl"))
        ]
        lines = [
            line for file in files for line in file.read_text(encoding="utf-8").splitlines(keepends=True)
        ]
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event[key] for event in events if key in event and where.items() <= event.items()]

    def losses(self) -> list[float]:
        """Return the held-out losses of its finished runs."""
        return sorted(self.values("loss", event="finished"))

    def speed(self) -> str:
        """Return its median speed."""
        return f"{statistics.median(self.values('tokens_per_second') or [0]):,.0f} tokens/s"


def _whole_and_resumed(folder: Path, size: Size) -> None:
    whole = Submission(folder, size, "whole", "prefix_simba", LENGTHS, 8)
    whole.end()
    layouts = {str(layout) for layout in whole.values("layout")}
    verdict(
        len(whole.losses()) == 2, f"a study of two runs: losses {whole.losses()}, {whole.speed()}, {layouts}"
    )
    cut = Submission(folder, size, "cut", "prefix_simba", LENGTHS, 8)
    wait_until(lambda: max(cut.values("step"), default=0) >= LENGTHS[1] // 2, PATIENCE, at_once=True)
    os.kill(cut.values("pid")[-1], signal.SIGTERM)
    cut.end()
    cut.start()
    cut.end()
    off = max((abs(a - b) for a, b in zip(whole.losses(), cut.losses(), strict=False)), default=9.0)
    was_cut = "SIGTERM" in cut.values("reason", event="preempted")
    ended = len(cut.losses()) == 2 and off < LOSS_OFF
    verdict(was_cut and ended, f"resumed after SIGTERM: losses {cut.losses()}, off by {off:.4f}")


def _short_of_memory(folder: Path, size: Size) -> None:
    short = Submission(folder, size, "oom", "cross_transformer", [20], 64, SHORT)
    short.end()
    micro = [layout["micro_batch"] for layout in short.values("layout")]
    text = f"in {SHORT:.1%} of the GPU: micro-batches {micro}, losses {short.losses()}"
    note(f"short of memory: {short.values('text', event='warning')}")
    if DEVICE == "cuda":
        verdict(bool(short.losses()) and min(micro) < 64, text)
    else:
        note(f"{text}; a CPU has no share")


def _two_at_once(folder: Path, size: Size) -> None:
    both = [
        Submission(folder, size, name, name, [60], 8, 0.5) for name in ("prefix_simba", "cross_transformer")
    ]
    for each in both:
        each.end()
    verdict(
        all(each.losses() for each in both),
        f"two series at once: {' and '.join(each.speed() for each in both)}",
    )
