"""Blocks compiled by torch.compile, so that a GPU does their element-wise work in one pass over each tensor.

Whether they can be is tried before training, on a model of one block with the shapes of the Run: torch.compile needs a
C compiler and Triton, and its errors come at the first call. If the trial fails, blocks run uncompiled and the journal
says why, as with missing kernels; an error after it fails the Run, since losses would change in silence. The first rank
tries alone: the others then find in the cache what it has compiled.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.common.disk import make_folder
from harness.plan.resources import is_compiled
from harness.record.root import Launch, Layout, Root
from harness.study.run import Precision, Run
from harness.train.precision import multiply_in
from harness.train.ranks import Ranks
from harness.train.stopping import is_out_of_memory

if TYPE_CHECKING:
    from ssmttm.model.music_lm import MusicLM

BACKEND = "inductor"
"""Backend of torch.compile."""
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compiled_layout(
    run: Run, layout: Layout, launch: Launch, ranks: Ranks, root: Root
) -> tuple[Layout, str | None]:
    """Return the layout with or without compiled blocks, and why they are not compiled if they should be; collective.

    They are compiled on GPUs unless the launch says otherwise.
    """
    if not is_compiled(launch.compile, layout.zero_stage, on_cuda=ranks.device.startswith("cuda")):
        return layout, None
    _use_cache(root)
    problem = ranks.run_on_first(lambda: _problem_with(run, layout, ranks.device), str | None)
    if problem is not None:
        return layout, f"blocks are not compiled, so steps take longer and more memory: {problem}"
    if not ranks.is_first and (problem := _problem_with(run, layout, ranks.device)) is not None:
        raise RuntimeError(f"rank {ranks.rank} cannot compile what the first rank has compiled: {problem}")
    return layout.model_copy(update={"compiled": True}), None


def compile_blocks(model: MusicLM) -> None:
    """Compile each block in place; names of weights stay, and blocks that are alike share what is compiled."""
    for block in model.blocks:
        block.compile(backend=BACKEND)


def forget_compiled() -> None:
    """Free what was compiled for models that are gone: torch.compile keeps few versions of a function."""
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()


def _problem_with(run: Run, layout: Layout, device: str) -> str | None:
    """Return why a model of one block cannot be trained and evaluated compiled; None if it can.

    What is compiled serves the training that follows.
    """
    from ssmttm.model.music_lm import MusicLM

    multiply_in(run.precision, device)
    model = MusicLM(run.model.model_copy(update={"n_blocks": 1})).to(device)
    model.checkpoints_activations = layout.activation_checkpointing
    positions = run.model.text.max_positions
    try:
        compile_blocks(model)
        # Captions differ in length: the second one has torch.compile take any.
        for width in dict.fromkeys((positions, max(1, positions - 1))):
            _try(model, run, layout.micro_batch, width)
    except Exception as error:  # torch.compile raises errors of many kinds, the compilers' own among them
        if is_out_of_memory(error):
            return None  # training will say so, and try a smaller micro-batch
        forget_compiled()
        said = " ".join(str(error).split("\n", maxsplit=2)[:2])  # the second line has the backend's own error
        return f"{type(error).__name__}: {said.strip()}"
    return None


def _try(model: MusicLM, run: Run, micro_batch: int, width: int) -> None:
    import torch

    from ssmttm.model.loss import codebook_cross_entropy
    from ssmttm.text.text_batch import TextBatch

    text, device = run.model.text, model.null_condition.device
    steps = run.frames + run.model.n_codebooks - 1
    tokens = torch.zeros(micro_batch, run.model.n_codebooks, steps, dtype=torch.int64, device=device)
    if text.encoder == "bytes":
        values = torch.zeros(micro_batch, width * text.patch, dtype=torch.int64, device=device)
    else:
        values = torch.zeros(micro_batch, width, text.dim, device=device)
    real = torch.ones(micro_batch, width, dtype=torch.bool, device=device)
    captions = TextBatch(values, real, torch.zeros(micro_batch, dtype=torch.bool, device=device))
    with torch.autocast(device.type, torch.bfloat16, enabled=run.precision is Precision.BF16):
        losses, _ = codebook_cross_entropy(model.train()(tokens, captions), tokens)
        torch.autograd.backward(losses.sum())
        with torch.no_grad():
            model.eval()(tokens, captions)


def _use_cache(root: Root) -> None:
    """Keep what is compiled below ROOT, in a folder of the user's own, since torch runs what it finds there."""
    folder = Path(root.path.absolute(), "cache", f"torch-{os.geteuid()}")
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid == os.geteuid() and not stat.S_IMODE(facts.st_mode) & 0o022:
        os.environ.setdefault(VARIABLE, str(folder))
