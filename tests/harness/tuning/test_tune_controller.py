"""The controller of a search: what it asks, has trained, tells and finds again; with real training in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from harness.common.disk import DiskFull
from harness.record.control import Control
from harness.record.journal import read_progress
from harness.record.root import Root
from harness.record.status import RunState
from harness.tuning.controller import Controller
from harness.tuning.session import tune_study
from harness.tuning.space import SearchCase, Space
from harness.tuning.storage import JOURNAL, open_database, open_journal, open_search
from harness.tuning.trials import TrialOutcome, TrialRecord
from tests.harness.journals import rows_of
from tests.harness.trainer import losses, train
from tests.harness.tuner import InThisProcess, space_of, tuned_here, with_rate
from tests.studies import Fields

RATE = "training.optimiser.lr"


@pytest.fixture
def fields(study_fields: Fields) -> Fields:
    """Two trials of one size, two steps each."""
    study_fields["grid"]["iterations"] = [2, 4]
    study_fields["training"]["schedule"] = {"warmup": 1}
    study_fields["tune"] = {
        "sizes": ["xs"],
        "trials": 2,
        "search": {"optimiser.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
    }
    return study_fields


def the_case(space: Space) -> SearchCase:
    (case,) = space.cases
    return case


def told_of(controller: Controller) -> list[TrialRecord]:
    """The trials of the one search."""
    return controller.told(the_case(controller.space))


def losses_by_rate(controller: Controller) -> dict[float, float | None]:
    return {one.values[RATE]: one.result.loss for one in told_of(controller)}


def record_of(root: Root, space: Space, eval_every: int | None = None) -> optuna.Study:
    """The record of the one search, made before a controller asks for it."""
    folder = root.study("tiny") / "tune"
    folder.mkdir(parents=True)
    return open_search(open_journal(folder), the_case(space), space.tune, space.iterations, eval_every)


def say_nothing(case: SearchCase, told: TrialRecord) -> None:
    pass


class Killed(Exception):
    """Stands for the end of a controller between two of its steps."""


def kill_at(number: int = 0) -> Callable[[SearchCase, TrialRecord], None]:
    """End the controller when it is told of the trial of this number or a later one."""

    def kill(_: SearchCase, told: TrialRecord) -> None:
        if told.number >= number:
            raise Killed

    return kill


def test_a_trial_is_worth_the_mean_of_its_runs_final_losses(fields: Fields, here: Root) -> None:
    fields["tune"] |= {"trials": 2, "seeds": [0, 1]}
    controller, place = tuned_here(here, fields)
    case = the_case(controller.space)
    assert len(place.trained) == 4
    for told in told_of(controller):
        points = controller.space.trial(case.architecture, case.size, told.values).points
        finals = [(read_progress(here.run(point.run_id)).result or {})["loss"] for point in points]
        assert told.result.loss == pytest.approx(sum(finals) / 2, rel=1e-12)


def test_a_trial_that_somebody_trained_as_a_run_is_not_trained_again(fields: Fields, here: Root) -> None:
    fields["tune"] |= {"search": {"optimiser.lr": {"choices": [0.01, 0.02]}}, "trials": 4}
    theirs = with_rate(fields, 0.01, iterations=2)
    train(here, theirs)
    controller, place = tuned_here(here, fields)
    assert [losses_by_rate(controller)[0.01]] == losses(here, theirs)
    assert len(place.trained) == 1


def test_equal_suggestions_are_trained_once_and_told_alike(fields: Fields, here: Root) -> None:
    fields["tune"] |= {"search": {"optimiser.lr": {"choices": [0.01, 0.02]}}, "trials": 6, "parallel": 3}
    controller, place = tuned_here(here, fields)
    told = told_of(controller)
    assert len(told) == 6
    assert len(place.trained) == len(set(place.trained)) == 2
    assert len({(one.values[RATE], one.result.loss) for one in told}) == 2


def test_suggestions_that_differ_in_the_fourth_digit_are_one_trial(fields: Fields, here: Root) -> None:
    fields["tune"]["search"]["optimiser.lr"] = {"low": 0.01, "high": 0.0100001}
    _, place = tuned_here(here, fields)
    assert len(place.trained) == 1


def test_values_that_differ_in_what_an_architecture_has_no_use_for_are_one_trial(
    fields: Fields, here: Root
) -> None:
    fields["grid"]["architectures"] = {"cross_transformer": None}
    fields["tune"] |= {"search": {"model.d_state": {"choices": [8, 16]}}, "trials": 4, "parallel": 4}
    controller, place = tuned_here(here, fields)
    assert len(told_of(controller)) == 4
    assert len(place.trained) == 1


def test_values_that_make_no_run_together_fail_and_the_search_goes_on(
    fields: Fields, tracked_root: Root
) -> None:
    search = {"d_model": {"choices": [16, 24]}, "ssm_head_dim": {"choices": [8, 32, 16]}}
    fields["tune"] |= {"search": {f"model.{key}": one for key, one in search.items()}, "trials": 1}
    space = space_of(tracked_root, fields)
    record_of(tracked_root, space).enqueue_trial({"model.d_model": 24, "model.ssm_head_dim": 32})
    done = tune_study(space, lambda: InThisProcess(tracked_root, "tiny/tune"), say_nothing)
    ((_, failed),) = done.failed
    assert "does not divide into heads of 32" in str(failed.result.reason)
    assert [told.outcome for told in done.told[the_case(space)]] == [
        TrialOutcome.FAILED,
        TrialOutcome.FINISHED,
    ]


def test_a_trial_without_hope_is_pruned_and_its_run_left_to_others(
    fields: Fields, tracked_root: Root
) -> None:
    fields["grid"]["iterations"] = [20]
    fields["tracking"]["eval_every"] = 5
    fields["tune"] |= {"trials": 5, "pruner": "median"}
    space = space_of(tracked_root, fields)
    record = record_of(tracked_root, space, eval_every=5)
    for rate in (1e-3, 1e-2, 2e-2, 1e-1):  # earlier trials that learnt what nobody can
        earlier = create_trial(
            params={RATE: rate},
            distributions=space.distributions(),
            value=0.1,
            intermediate_values=dict.fromkeys((5, 10, 15), 0.1),
        )
        record.add_trial(earlier)
    place = InThisProcess(tracked_root, "tiny/tune", stop_after=8)
    done = tune_study(space, lambda: place, say_nothing)
    assert [told.outcome for told in done.told[the_case(space)]] == [TrialOutcome.FINISHED] * 4 + [
        TrialOutcome.PRUNED
    ]
    (run_id,) = place.trained
    assert 5 <= done.steps[the_case(space)] < 15
    (trial,) = record.get_trials(states=(TrialState.PRUNED,))
    assert set(trial.intermediate_values) == {5}
    assert Control(tracked_root.study("tiny/tune") / "control.jsonl").cancelled() == {run_id}

    # A study that has this Run finds it neither failed nor cancelled.
    theirs = with_rate(fields, space.values(trial.params)[RATE]) | {"name": "other"}
    (row,) = rows_of(tracked_root, theirs)
    assert row.run_id == run_id
    assert row.state in {RunState.NEW, RunState.INTERRUPTED}


def test_a_disk_that_takes_no_more_of_the_record_is_named_and_the_search_goes_on_later(
    fields: Fields, tracked_root: Root, small_disk: Callable[[int], Path]
) -> None:
    fields["tune"] |= {"search": {"optimiser.lr": {"choices": [0.01, 0.02]}}, "trials": 60}
    folder = small_disk(2**18)
    tracked_root.study("tiny").mkdir(parents=True)
    (tracked_root.study("tiny") / "tune").symlink_to(folder)
    place, filler = InThisProcess(tracked_root, "tiny/tune"), folder / "filler"

    def fill(_: SearchCase, told: TrialRecord) -> None:
        if len(place.trained) == 2 and not filler.exists():  # from here on the record alone grows
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(2**18))

    with pytest.raises(DiskFull, match=r"optuna\.log: its disk is full"):
        tune_study(space_of(tracked_root, fields), lambda: place, fill)
    filler.unlink()
    fields["tune"]["trials"] = 5
    done = tune_study(space_of(tracked_root, fields), lambda: place, say_nothing)
    assert len(place.trained) == 2
    assert {told.outcome for told in done.told[the_case(done.space)]} == {TrialOutcome.FINISHED}


@pytest.mark.parametrize("storage", ["file", "database"])
def test_a_controller_goes_on_where_one_was_killed(
    storage: str, fields: Fields, here: Root, tmp_path: Path
) -> None:
    def opened() -> Any:
        uri = f"sqlite:///{tmp_path / 'optuna.db'}"
        return open_database(uri, "test") if storage == "database" else None

    with pytest.raises(Killed):
        tuned_here(here, fields, kill_at(), opened())
    before = {path: path.read_bytes() for path in here.path.glob("runs/*/journal/*")}
    assert len(before) == 1
    controller, place = tuned_here(here, fields, storage=opened())
    assert len(told_of(controller)) == 2
    assert len(place.trained) == 1
    assert {path: path.read_bytes() for path in before} == before


def test_what_finished_while_nobody_controlled_is_told_and_not_trained(fields: Fields, here: Root) -> None:
    space = space_of(here, fields)
    case = the_case(space)
    controller, _ = tuned_here(here, {**fields, "tune": {**fields["tune"], "trials": 1}})
    search = controller.searches[case]
    search.enqueue_trial({RATE: 0.05})
    search.ask(fixed_distributions=space.distributions())  # and then killed, while a job elsewhere trained on
    theirs = with_rate(fields, 0.05, iterations=2)
    train(here, theirs)
    controller, place = tuned_here(here, fields)
    assert [controller.told(case)[1].result.loss] == losses(here, theirs)
    assert place.trained == []


def test_values_that_diverge_are_told_as_bad_and_not_as_a_failure(fields: Fields, here: Root) -> None:
    fields["grid"]["iterations"] = [8]
    fields["tune"] |= {"search": {"optimiser.lr": {"choices": [1e-3, 1e30]}}, "trials": 4}
    controller, _ = tuned_here(here, fields)
    by_rate = {one.values[RATE]: one for one in told_of(controller)}
    assert by_rate[1e-3].outcome is TrialOutcome.FINISHED
    assert by_rate[1e30].outcome is TrialOutcome.DIVERGED
    assert "loss" in str(by_rate[1e30].result.reason)


def test_a_trial_that_failed_counts_until_its_values_succeed(fields: Fields, here: Root) -> None:
    fields["tune"] |= {"search": {"optimiser.lr": {"choices": [0.01, 0.02]}}, "trials": 6}
    controller, _ = tuned_here(here, fields, losing=1)
    first, *rest = told_of(controller)
    assert (first.outcome, {one.outcome for one in rest}, len(rest)) == (
        TrialOutcome.FAILED,
        {TrialOutcome.FINISHED},
        6,
    )
    assert {one.values[RATE] for one in rest} == {0.01, 0.02}
    assert controller.failed() == []


def test_a_trial_that_failed_for_good_is_told_by_the_call_it_failed_in(fields: Fields, here: Root) -> None:
    controller, _ = tuned_here(here, fields, losing=1)
    (case,) = controller.searches
    first, *rest = controller.told(case)
    assert [one.outcome for one in rest] == [TrialOutcome.FINISHED] * 2
    assert controller.failed() == [(case, first)]
    again, place = tuned_here(here, fields)
    assert again.told(case) == [first, *rest]
    assert (again.failed(), place.trained) == ([], [])


def test_what_another_root_trains_is_left_to_it_and_what_it_finished_is_known(
    fields: Fields, tmp_path: Path
) -> None:
    fields["tune"] |= {"storage": f"sqlite:///{tmp_path / 'optuna.db'}", "trials": 3}
    ours, theirs = Root(tmp_path / "ours"), Root(tmp_path / "theirs")

    def opened() -> Any:
        return open_database(fields["tune"]["storage"], "test")

    with pytest.raises(Killed):
        tuned_here(theirs, fields | {"tune": fields["tune"] | {"parallel": 3}}, kill_at(1), opened())
    controller, place = tuned_here(ours, fields, storage=opened())
    assert place.trained == []  # two are finished and one is theirs: no fourth was asked for
    assert [one.number for one in told_of(controller)] == [0, 1]
    assert controller.elsewhere() == 1
    again, place = tuned_here(theirs, fields, storage=opened())
    assert [one.number for one in told_of(again)] == [0, 1, 2]
    assert again.elsewhere() == 0


def test_a_trial_of_nobody_is_left_to_whoever_asks_for_it_until_that_cannot_be(
    fields: Fields, here: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields["tune"] |= {"storage": f"sqlite:///{tmp_path / 'optuna.db'}", "trials": 1}
    storage = open_database(fields["tune"]["storage"], "test")
    space = space_of(here, fields)
    search = open_search(storage, the_case(space), space.tune, space.iterations, None)
    search.ask(fixed_distributions=space.distributions())  # another ROOT's, which is about to say so
    controller, place = tuned_here(here, fields, storage=storage)
    assert (place.trained, controller.elsewhere()) == ([], 1)
    monkeypatch.setattr("harness.tuning.storage.ASKING_SECONDS", -1.0)
    controller, place = tuned_here(here, fields, storage=storage)
    assert (len(place.trained), controller.elsewhere()) == (1, 0)


def test_a_record_in_a_file_goes_on_though_it_is_not_known_whose_it_was(fields: Fields, here: Root) -> None:
    with pytest.raises(Killed):
        tuned_here(here, fields | {"tune": fields["tune"] | {"parallel": 2}}, kill_at())
    (here.study("tiny") / "tune" / "owner").unlink()
    controller, _ = tuned_here(here, fields)
    assert [one.outcome for one in told_of(controller)] == [TrialOutcome.FINISHED] * fields["tune"]["trials"]
    assert controller.elsewhere() == 0


def test_runs_of_a_trial_that_is_over_are_cancelled_before_anything_calls_it_over(
    fields: Fields, here: Root
) -> None:
    fields["tune"] |= {"seeds": [0, 1], "search": {"optimiser.lr": {"low": 1e30, "high": 1.0001e30}}}
    train(here, with_rate(fields, 1e30, iterations=2))  # the first seed, which diverges
    with pytest.raises(Killed):
        tuned_here(here, fields, kill_at())
    (second,) = Control(here.study("tiny/tune") / "control.jsonl").cancelled()
    trial = space_of(here, fields).trial("prefix_simba", "xs", {RATE: 1e30})
    assert second == trial.points[1].run_id


def test_a_record_that_ends_in_half_a_line_is_read_and_written_on(fields: Fields, here: Root) -> None:
    fields["tune"]["trials"] = 1
    tuned_here(here, fields)
    folder = here.study("tiny") / "tune"
    with (folder / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 4, "worker')  # as a writer leaves it that is killed
    (folder / f"{JOURNAL}.lock").symlink_to(folder / JOURNAL)
    fields["tune"]["trials"] = 2
    controller, place = tuned_here(here, fields)
    assert len(place.trained) == 1
    assert len(open_journal(folder).get_all_studies()) == 1
    assert len(told_of(controller)) == 2


def test_another_length_or_other_seeds_begin_a_search_of_their_own(fields: Fields, here: Root) -> None:
    def name_with(**change: Any) -> str:
        return the_case(space_of(here, {**fields, "tune": {**fields["tune"], **change}})).name

    choices = {"search": {"optimiser.lr": {"choices": [0.01, 0.02]}}}
    more = {"search": {"optimiser.lr": {"choices": [0.01, 0.02, 0.03]}}}
    even = {"search": {"optimiser.lr": {"low": 1e-3, "high": 1e-1}}}
    for change in ({"iterations": 4}, {"seeds": [0, 1]}, choices, more, even):
        assert name_with(**change) != name_with()
    for change in ({"trials": 9}, {"search": {"optimiser.lr": {"low": 1e-4, "high": 1.0, "log": True}}}):
        assert name_with(**change) == name_with()
