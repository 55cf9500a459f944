"""What a worker imports and looks up in its first seconds, done once for all that are forked from here."""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from ssmttm.compat import without_mlflow

with without_mlflow():
    import deepspeed

assert deepspeed.ops.__compatible_ops__ is not None  # asks a compiler for each
gc.collect()
gc.freeze()  # what is never collected is never copied either
