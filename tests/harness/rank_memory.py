"""One rank that trains models for a few steps and prints its peak memory for each, as a JSON list.

    python -m tests.harness.rank_memory '[{"model": .., "frames": .., "layout": ..}, ..]'

It counts the bytes malloc has handed out, a thousand times a second, since torch's profiler misses what the
threads of a process group free. A first, small model makes the imports, which do not count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
import time
from typing import Any

import numpy as np


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Return the bytes that malloc has handed out and that are not freed."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Mallinfo2
    told = ask()
    return int(told.uordblks + told.hblkhd)


class Peak:
    """Most bytes allocated during a block, over those at its beginning."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.bytes, self._begun, self._over = 0, allocated(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.bytes = max(self.bytes, allocated() - self._begun)
            time.sleep(0.0003)


def peak_of(spec: dict[str, Any]) -> int:
    """Train three steps of the model of `spec` on its layout; returns the peak of this rank, bytes."""
    import torch

    from harness.record.root import Layout
    from harness.study.run import Optimiser, Run
    from harness.train.engine import Engine
    from harness.train.ranks import initialise_ranks
    from ssmttm.model.config import ModelConfig
    from ssmttm.model.loss import codebook_cross_entropy
    from ssmttm.text.byte_encoder import collate_bytes

    ranks = initialise_ranks(1)
    model = ModelConfig.model_validate(spec["model"])
    layout = Layout.model_validate(spec["layout"])
    run = Run(
        model=model,
        corpus="0" * 64,
        frames=spec["frames"],
        batch=layout.ranks * layout.micro_batch * layout.accumulation,
        optimiser=Optimiser(lr=1e-4),
        iterations=9,
    )
    size, steps = layout.micro_batch, run.frames + model.n_codebooks - 1
    captions = ["x" * model.text.patch * model.text.max_positions] * size

    def share() -> torch.Tensor:
        tokens = torch.randint(0, model.codebook_size, (size, model.n_codebooks, steps))
        tokens = tokens.to(ranks.device)
        text = collate_bytes(captions, np.zeros(size, bool), model.text).to(ranks.device)
        sums, _ = codebook_cross_entropy(engine.deepspeed(tokens, text), tokens)
        return sums.sum() / tokens.numel()

    on_cuda = ranks.device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Peak() as peak:
        engine = Engine(run, layout, ranks)
        for _ in range(3):
            engine.step([share] * layout.accumulation, 1e-4)
            gc.collect()
    return int(torch.cuda.max_memory_allocated() - before) if on_cuda else peak.bytes


def main() -> None:
    """Measure every model asked for, one after the other."""
    sys.setswitchinterval(0.0005)
    specs = json.loads(sys.argv[1])
    small = {"n_blocks": 1, "d_model": 16, "d_state": 8, "ssm_head_dim": 8, "head_dim": 8}
    for stage in sorted({spec["layout"]["zero_stage"] for spec in specs}):
        first = next(spec for spec in specs if spec["layout"]["zero_stage"] == stage)
        peak_of({**first, "model": first["model"] | small, "frames": 8})
    gc.collect()
    peaks = []
    for spec in specs:
        peaks.append(peak_of(spec))
        gc.collect()
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
