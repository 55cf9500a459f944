"""Made-up results of evaluations, for tests of records and bundles."""

from __future__ import annotations

from harness.record.scores import Evaluation, Score, Settings

SETTINGS = Settings(
    prompts="a" * 64,
    n_prompts=4,
    frames=50,
    temperature=1.0,
    top_k=None,
    guidance=3.0,
    seed=0,
    reference="codec-decoded held-out clips",
    reference_digest="b" * 64,
)


def scored(settings: Settings | None, notes: tuple[str, ...] = (), **values: float) -> Evaluation:
    """Make an evaluation with these scores; settings of None are those of the held-out loss."""
    held = {name: Score(value=value, t=1.0) for name, value in values.items()}
    return Evaluation(settings=settings, n_prompts=4, scores=held, notes=notes)
