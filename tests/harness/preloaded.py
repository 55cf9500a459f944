"""The imports of a worker, made once for all workers that are forked from this process."""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from ssmttm.compat import without_mlflow

with without_mlflow():
    import deepspeed  # noqa: F401

import harness.train.worker  # noqa: F401
import ssmttm.model.music_lm  # noqa: F401

gc.collect()
gc.freeze()  # objects that are never collected are never copied by a fork
