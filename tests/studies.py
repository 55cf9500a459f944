"""Studies of tests and benchmarks, as the mapping their YAML holds."""

import copy
from pathlib import Path
from typing import Any

Fields = dict[str, Any]


def tiny_study(corpus: Path) -> Fields:
    """Two runs of one small model on one trunk."""
    return {
        "name": "tiny",
        "corpus": {"path": str(corpus)},
        "text": {"dim": 16, "max_positions": 8},
        "model": {"d_state": 8, "ssm_head_dim": 8, "head_dim": 8, "dropout": 0.0},
        "grid": {
            "architectures": {"prefix_simba": None},
            "sizes": {"xs": {"n_blocks": 1, "d_model": 16}},
            "iterations": [5, 10],
        },
        "training": {"batch": 8, "optimiser": {"lr": 3e-3}, "schedule": {"warmup": 2}},
        "tracking": {"log_every": 1},
    }


def with_iterations(fields: Fields, *iterations: int) -> Fields:
    """Return the study with runs of these lengths."""
    changed = copy.deepcopy(fields)
    changed["grid"]["iterations"] = list(iterations)
    return changed
