"""Going on on another number of ranks: a ZeRO checkpoint is first turned into one that any number can read.

DeepSpeed's own converter runs in a process of its own, on files that were looked through before. What it makes is
used once and removed; the checkpoint itself stays as it was written.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from harness.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from harness.training.engine import Engine


def load_universal(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put an engine back to a checkpoint that another number of ranks wrote under the same ZeRO stage; collective.

    Raises RuntimeError with the converter's last line where it fails.
    """
    target = checkpoint.folder / f"universal-{checkpoint.tag}"

    def convert() -> None:
        shutil.rmtree(target, ignore_errors=True)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "deepspeed.checkpoint.ds_to_universal",
                "--inject_missing_state",
                "--num_extract_workers=1",
                "--num_merge_workers=1",
                f"--input_folder={checkpoint.path}",
                f"--output_folder={target}",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{checkpoint.path}: {done.stderr.strip().splitlines()[-1]}")

    try:
        engine.ranks.first_does(convert)
        engine.load_universal(checkpoint.folder, target.name)
    finally:
        engine.ranks.first_does(lambda: shutil.rmtree(target, ignore_errors=True))
