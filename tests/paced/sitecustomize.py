"""Python imports this from PYTHONPATH at its start: it makes optimiser steps come at a given pace.

Two cores cannot run eight ranks at full speed, but eight ranks can keep a slow pace on them. On a fast machine, a test
meets a job in the middle of its training. Steps after a late one are shorter, so that the pace is kept.

A worker whose PACED_FIFO exists waits for it in its start, as for a module on a file system that hangs.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ENGINE = "harness.train.engine"


class _Paced(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != ENGINE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_pace(module: ModuleType) -> None:
            with suppress(KeyError, FileNotFoundError):
                Path(os.environ["PACED_FIFO"]).read_bytes()
            load(module)
            _pace(module.Engine, float(os.environ["PACED_STEP_SECONDS"]))

        spec.loader.exec_module = load_and_pace  # type: ignore[method-assign]
        return spec


def _pace(engine: Any, seconds: float) -> None:
    step = engine.step

    def paced(self: Any, *arguments: Any) -> None:
        due = getattr(self, "paced_until", time.monotonic()) + seconds
        step(self, *arguments)
        time.sleep(max(0.0, due - time.monotonic()))
        self.paced_until = max(due, time.monotonic() - seconds)

    engine.step = paced


if "PACED_STEP_SECONDS" in os.environ:
    sys.meta_path.insert(0, _Paced())
