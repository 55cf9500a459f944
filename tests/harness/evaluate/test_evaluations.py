"""The table of scores: one row per score, with settings that hold everything a value depends on."""

from __future__ import annotations

from harness.record.root import Root
from harness.record.scores import as_csv, evaluation_rows, keep_evaluation
from harness.record.status import RunState
from tests.harness.journals import registered, rows_of, write_finished
from tests.harness.scores import SETTINGS, scored
from tests.studies import Fields


def test_every_score_of_a_finished_run_is_one_row_of_the_csv(here: Root, study_fields: Fields) -> None:
    resolved = registered(here, study_fields)
    write_finished(here, resolved.points[:1])
    first, second = (point.run.run_id for point in resolved.points)
    keep_evaluation(here, first, scored(None, ppl=54.6, ce=4.0))
    keep_evaluation(here, first, scored(SETTINGS, **{"fd_clap-1a2b3c4d": 0.5}))
    keep_evaluation(here, second, scored(None, ce=1.0))  # it has not finished
    rows = evaluation_rows(resolved)
    (done,) = [row for row in rows_of(here, study_fields) if row.state is RunState.DONE]
    assert done.result is not None
    header, *lines = as_csv(rows).splitlines()
    assert header == "run_id,architecture,n_params,iterations,seed,metric,value,n_prompts,settings"
    run = f"{first},prefix_simba,{done.result['n_params']},5,0"
    assert sorted(lines) == [
        f"{run},ce,4.0,4,held-out",
        f"{run},fd_clap-1a2b3c4d,0.5,4,{SETTINGS.digest}",
        f"{run},ppl,54.6,4,held-out",
    ]


def test_everything_that_changes_a_value_changes_the_settings() -> None:
    changed = [
        SETTINGS.model_copy(update={"seed": 1}),
        SETTINGS.model_copy(update={"reference_digest": "c" * 64}),
    ]
    assert len({SETTINGS.digest, *(one.digest for one in changed)}) == 3
    assert changed[1].generation_digest == SETTINGS.generation_digest != changed[0].generation_digest
