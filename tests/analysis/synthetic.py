"""A study with a known answer: two architectures under known laws, with noise of series and of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

Values = float | np.ndarray | pd.Series

TRANSFORMER = {"E": 2.5, "A": 60.0, "B": 2000.0, "alpha": 0.35, "beta": 0.5}
SIMBA = {"E": 2.5, "A": 36.0, "B": 2000.0, "alpha": 0.35, "beta": 0.5}
TRUE_RATIO = (60.0 / 36.0) ** (1 / 0.35)  # equal E, B and exponents: the same at every budget and size
TOKENS_AN_ITERATION = 16_000.0


def loss_by(law: dict[str, float], n_params: Values, tokens: Values) -> Values:
    """Return the loss in nats of a law of size and tokens."""
    return law["E"] + law["A"] / n_params ** law["alpha"] + law["B"] / tokens ** law["beta"]


def against(**changes: float) -> dict[str, dict[str, float]]:
    """Return the transformer's law and a changed law of SiMBA."""
    return {"cross_transformer": TRANSFORMER, "prefix_simba": SIMBA | changes}


@dataclass(frozen=True)
class SyntheticStudy:
    """Sizes x iterations nested in one series for each size and seed, extra seeds at the smallest sizes."""

    laws: dict[str, dict[str, float]] = field(default_factory=against)
    sizes: Sequence[float] = (1e5, 3e5, 1e6, 3e6)
    iterations: Sequence[int] = (400, 800, 1600)
    seeds: Sequence[int] = (3, 1, 1, 1)
    cluster_noise: float = 0.005
    row_noise: float = 0.002

    def table(self, seed: int) -> pd.DataFrame:
        """Return the study's points as a raw table; noise multiplies the loss."""
        rng = np.random.default_rng(seed)
        rows = []
        for name, law in self.laws.items():
            for size, seeds in zip(self.sizes, self.seeds, strict=True):
                for number in range(seeds):
                    shared = rng.normal() * self.cluster_noise
                    for count in self.iterations:
                        tokens = count * TOKENS_AN_ITERATION
                        off = np.exp(shared + rng.normal() * self.row_noise)
                        rows.append(
                            {
                                "architecture": name,
                                "n_params": size,
                                "tokens": tokens,
                                "iterations": count,
                                "flops": 6 * size * tokens * (1.2 if "simba" in name else 1.0),
                                "loss": loss_by(law, size, tokens) * off,
                                "run_id": f"{name}-{size:.0f}-{number}-{count}",
                                "cluster": f"{name}-{size:.0f}-{number}",
                                "seed": number,
                                "annealed": True,
                            }
                        )
        return pd.DataFrame(rows)


SIX_SIZES = tuple(np.geomspace(1e5, 1e7, 6).tolist())
WIDE = SyntheticStudy(sizes=SIX_SIZES, iterations=(200, 400, 800, 1600), seeds=(2,) * 6)
QUIET = SyntheticStudy(cluster_noise=1e-6, row_noise=1e-6)


NAMES = (
    *("cross_transformer", "prefix_simba", "cross_simba", "prefix_mamba"),
    *("hybrid attention with gated delta networks, 4 to 1 layers v2", "RWKV-7", "xlstm", "RetNet"),
    *(
        "hyena-striped/2024-11-03_final (lr 3e-4)",
        "GLA",
        "griffin_recurrent_local_attention_window_2048_bf16",
        "S5",
    ),
)
"""Twelve architectures: of ours, short foreign ones, and ones of 40 to 60 characters."""


def of_many(count: int, **shape: Any) -> SyntheticStudy:
    """Return a study of the first of NAMES, each a little better than the one before, with 20 points by default."""
    laws = {name: TRANSFORMER | {"A": 60 * 0.93**k} for k, name in enumerate(NAMES[:count])}
    usual = {"sizes": tuple(1e5 * 2.0**k for k in range(5)), "iterations": (200, 400, 800, 1600)} | shape
    usual.setdefault("seeds", (1,) * len(usual["sizes"]))
    return SyntheticStudy(laws=laws, cluster_noise=0.01, **usual)
