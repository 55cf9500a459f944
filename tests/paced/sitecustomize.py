"""Found on PYTHONPATH before training is: optimiser steps that come at a given pace, however fast the machine is.

Two cores cannot run eight ranks at full speed, but they can have eight ranks keep a slow pace; and what is to be met
in the middle of its training is met there on a fast machine too. A step that is late is
made up for by those that follow, as a clock is kept and not a pause.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
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
