"""The controller of a search: its trials, their results and its restarts, with real training in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import Trial, TrialState, create_trial

from harness.common.disk import DiskFull
from harness.record.control import Control
from harness.record.journal import read_progress
from harness.record.root import Root
from harness.record.status import RunState, RunStatus
from harness.study.grid import GridPoint
from harness.tuning.controller import Controller, _store
from harness.tuning.session import tune_study
from harness.tuning.space import SearchCase, Space
from harness.tuning.storage import JOURNAL, open_database, open_journal, open_search
from harness.tuning.trials import TrialOutcome, TrialRecord, TrialResult
from ssmttm.errors import InputError
from tests.harness.journals import rows_of
from tests.harness.trainer import losses, train
from tests.harness.tuner import InThisProcess, space_of, tuned_here, with_rate
from tests.studies import Fields

RATE = "training.optimiser.lr"
TWO_RATES = {"search": {"optimiser.lr": {"choices": [0.01, 0.02]}}}


@pytest.fixture
def fields(study_fields: Fields) -> Fields:
    """Two trials of one size, two steps each."""
    study_fields["grid"]["iterations"] = [2, 4]
    study_fields["training"]["schedule"] = {"warmup": 1}
    rates = {"optimiser.lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    study_fields["tune"] = {"sizes": ["xs"], "trials": 2, "search": rates}
    return study_fields


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def changed(fields: Fields, **tune: Any) -> Fields:
    return fields | {"tune": fields["tune"] | tune}


def outcomes(records: Sequence[TrialRecord]) -> list[str]:
    return [str(one.result.outcome) for one in records]


def the_case(space: Space) -> SearchCase:
    (case,) = space.cases
    return case


def records_of(controller: Controller) -> list[TrialRecord]:
    """The ended trials of the one search."""
    return controller.records(the_case(controller.space))


def losses_by_rate(controller: Controller) -> dict[float, float | None]:
    return {one.values[RATE]: one.result.loss for one in records_of(controller)}


def record_of(root: Root, space: Space, eval_every: int | None = None) -> optuna.Study:
    """The one search, opened before a controller opens it."""
    folder = root.study("tiny") / "tune"
    folder.mkdir(parents=True)
    return open_search(open_journal(folder), the_case(space), space.tune, space.iterations, eval_every)


def say_nothing(case: SearchCase, record: TrialRecord) -> None:
    pass


class Killed(Exception):
    """Ends a controller between two of its steps."""


def kill_at(number: int = 0) -> Callable[[SearchCase, TrialRecord], None]:
    """End the controller at the result of the trial of this number or a later one."""

    def kill(_: SearchCase, record: TrialRecord) -> None:
        if record.number >= number:
            raise Killed

    return kill


def test_a_trial_is_worth_the_mean_of_its_runs_final_losses(fields: Fields, here: Root) -> None:
    fields["tune"] |= {"trials": 2, "seeds": [0, 1]}
    controller, place = tuned_here(here, fields)
    case = the_case(controller.space)
    assert len(place.trained) == 4
    for told in records_of(controller):
        points = controller.space.trial(case.architecture, case.size, told.values).points
        finals = [(read_progress(here.run(point.run_id)).result or {})["loss"] for point in points]
        assert told.result.loss == pytest.approx(sum(finals) / 2, rel=1e-12)


def test_a_trial_that_was_trained_as_an_ordinary_run_is_not_trained_again(fields: Fields, here: Root) -> None:
    fields["tune"] |= TWO_RATES | {"trials": 4}
    theirs = with_rate(fields, 0.01, iterations=2)
    train(here, theirs)
    controller, place = tuned_here(here, fields)
    assert [losses_by_rate(controller)[0.01]] == losses(here, theirs)
    assert len(place.trained) == 1


@pytest.mark.parametrize(
    ("search", "count"),
    [
        ({"optimiser.lr": {"choices": [0.01, 0.02]}}, 2),
        ({"optimiser.lr": {"low": 0.01, "high": 0.0100001}}, 1),
        ({"model.d_state": {"choices": [8, 16]}}, 1),
    ],
    ids=["equal", "equal-to-three-digits", "not-used-by-the-architecture"],
)
def test_values_that_give_the_same_run_are_trained_once_and_have_one_result(
    search: Fields, count: int, fields: Fields, here: Root
) -> None:
    fields["grid"]["architectures"] = {"cross_transformer": None}  # which has no state
    fields["tune"] |= {"search": search, "trials": 6, "parallel": 3}
    controller, place = tuned_here(here, fields)
    assert len(records_of(controller)) == 6
    assert len(place.trained) == len(set(place.trained)) == count
    assert len({one.result.loss for one in records_of(controller)}) == count


def test_values_that_are_invalid_together_fail_and_the_search_goes_on(
    fields: Fields, tracked_root: Root
) -> None:
    search = {"d_model": {"choices": [16, 24]}, "ssm_head_dim": {"choices": [8, 32, 16]}}
    fields["tune"] |= {"search": {f"model.{key}": one for key, one in search.items()}, "trials": 1}
    space = space_of(tracked_root, fields)
    record_of(tracked_root, space).enqueue_trial({"model.d_model": 24, "model.ssm_head_dim": 32})
    done = tune_study(space, lambda: InThisProcess(tracked_root, "tiny/tune"), say_nothing)
    ((_, failed),) = done.failed
    assert "does not divide into heads of 32" in str(failed.result.reason)
    assert outcomes(done.records[the_case(space)]) == ["failed", "finished"]


def test_a_trial_without_hope_is_pruned_and_its_run_left_to_others(
    fields: Fields, tracked_root: Root
) -> None:
    fields["grid"]["iterations"] = [20]
    fields["tracking"]["eval_every"] = 5
    fields["tune"] |= {"trials": 5, "pruner": "median"}
    space = space_of(tracked_root, fields)
    record = record_of(tracked_root, space, eval_every=5)
    for rate in (1e-3, 1e-2, 2e-2, 1e-1):  # earlier trials with losses that no other reaches
        at = {"params": {RATE: rate}, "distributions": space.distributions()}
        record.add_trial(create_trial(**at, value=0.1, intermediate_values=dict.fromkeys((5, 10, 15), 0.1)))
    place = InThisProcess(tracked_root, "tiny/tune", stop_after=8)
    done = tune_study(space, lambda: place, say_nothing)
    assert outcomes(done.records[the_case(space)]) == ["finished"] * 4 + ["pruned"]
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


def test_a_full_disk_of_the_search_is_named_and_the_search_goes_on_later(
    fields: Fields, tracked_root: Root, small_disk: Callable[[int], Path]
) -> None:
    fields["tune"] |= TWO_RATES | {"trials": 60}
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
    assert set(outcomes(done.records[the_case(done.space)])) == {"finished"}


@pytest.mark.parametrize("in_database", [False, True], ids=["file", "database"])
def test_a_controller_goes_on_where_one_was_killed(
    in_database: bool, fields: Fields, here: Root, database: str
) -> None:
    with pytest.raises(Killed):
        tuned_here(here, fields, kill_at(), open_database(database, "test") if in_database else None)
    before = {path: path.read_bytes() for path in here.path.glob("runs/*/journal/*")}
    assert len(before) == 1
    storage = open_database(database, "test") if in_database else None
    controller, place = tuned_here(here, fields, storage=storage)
    assert len(records_of(controller)) == 2
    assert len(place.trained) == 1
    assert {path: path.read_bytes() for path in before} == before


def test_a_trial_that_finished_without_a_controller_is_not_trained_again(fields: Fields, here: Root) -> None:
    space = space_of(here, fields)
    case = the_case(space)
    controller, _ = tuned_here(here, changed(fields, trials=1))
    search = controller.searches[case]
    search.enqueue_trial({RATE: 0.05})
    search.ask(fixed_distributions=space.distributions())  # and then killed, while a job elsewhere trained on
    theirs = with_rate(fields, 0.05, iterations=2)
    train(here, theirs)
    controller, place = tuned_here(here, fields)
    assert [controller.records(case)[1].result.loss] == losses(here, theirs)
    assert place.trained == []


def test_values_that_diverge_are_bad_and_no_failure(fields: Fields, here: Root) -> None:
    fields["grid"]["iterations"] = [8]
    fields["tune"] |= {"search": {"optimiser.lr": {"choices": [1e-3, 1e30]}}, "trials": 4}
    controller, _ = tuned_here(here, fields)
    by_rate = {one.values[RATE]: one.result for one in records_of(controller)}
    assert (by_rate[1e-3].outcome, by_rate[1e30].outcome) == ("finished", "diverged")
    assert "loss" in str(by_rate[1e30].reason)


def test_a_trial_that_failed_counts_until_its_values_succeed(fields: Fields, here: Root) -> None:
    fields["tune"] |= TWO_RATES | {"trials": 6}
    controller, _ = tuned_here(here, fields, losing=1)
    assert outcomes(records_of(controller)) == ["failed"] + ["finished"] * 6
    assert {one.values[RATE] for one in records_of(controller)[1:]} == {0.01, 0.02}
    assert controller.failed() == []


def test_a_trial_that_failed_for_good_is_listed_by_the_call_it_failed_in(fields: Fields, here: Root) -> None:
    controller, _ = tuned_here(here, fields, losing=1)
    (case,) = controller.searches
    first, *rest = controller.records(case)
    assert outcomes(rest) == ["finished"] * 2
    assert controller.failed() == [(case, first)]
    again, place = tuned_here(here, fields)
    assert again.records(case) == [first, *rest]
    assert (again.failed(), place.trained) == ([], [])


def test_trials_of_another_root_are_left_to_it_and_their_results_known(
    fields: Fields, database: str, tmp_path: Path
) -> None:
    fields["tune"] |= {"storage": database, "trials": 3}
    ours, theirs = Root(tmp_path / "ours"), Root(tmp_path / "theirs")
    with pytest.raises(Killed):
        tuned_here(theirs, changed(fields, parallel=3), kill_at(1), open_database(database, "test"))
    controller, place = tuned_here(ours, fields, storage=open_database(database, "test"))
    assert place.trained == []  # two are finished and one is theirs: no fourth was asked for
    assert [one.number for one in records_of(controller)] == [0, 1]
    assert controller.elsewhere() == {theirs.identity(): 1}
    again, place = tuned_here(theirs, fields, storage=open_database(database, "test"))
    assert [one.number for one in records_of(again)] == [0, 1, 2]
    assert not again.elsewhere()


def test_trials_of_a_lost_root_are_given_up_by_name_and_replaced(
    fields: Fields, database: str, tmp_path: Path
) -> None:
    fields["tune"] |= {"storage": database, "trials": 2}
    ours, lost = Root(tmp_path / "ours"), Root(tmp_path / "lost")
    with pytest.raises(Killed):
        tuned_here(lost, changed(fields, parallel=2), kill_at(), open_database(database, "test"))
    controller, place = tuned_here(ours, fields, storage=open_database(database, "test"))
    assert (place.trained, controller.elsewhere()) == ([], {lost.identity(): 1})
    with pytest.raises(InputError, match=f"they are {lost.identity()[:8]}"):
        controller.release(ours.identity()[:8])
    search, frozen = next(iter(controller._elsewhere()))
    controller.release(lost.identity()[:8])
    assert not controller.elsewhere()
    again, place = tuned_here(ours, fields, storage=open_database(database, "test"))
    assert sorted(outcomes(records_of(again))) == ["failed", "finished", "finished"]
    assert any("given up as lost" in str(one.result.reason) for one in records_of(again))
    # The other ROOT was not lost: what it says of such a trial changes nothing, and does not end its search.
    _store(search, Trial(search, frozen._trial_id), TrialResult(TrialOutcome.FINISHED, 1.0))
    assert sorted(outcomes(records_of(again))) == ["failed", "finished", "finished"]


def test_trials_marked_with_the_id_of_an_older_version_are_still_this_roots(
    fields: Fields, here: Root, database: str
) -> None:
    fields["tune"] |= {"storage": database, "trials": 1}
    space, storage = space_of(here, fields), open_database(database, "test")
    search = open_search(storage, the_case(space), space.tune, space.iterations, None)
    search.ask(fixed_distributions=space.distributions()).set_user_attr("ssmscale.owner", "ab" * 16)
    (here.study("tiny") / "tune").mkdir(parents=True)
    (here.study("tiny") / "tune" / "owner").write_text("ab" * 16 + "\n")
    controller, place = tuned_here(here, fields, storage=storage)
    assert (len(place.trained), controller.elsewhere()) == (1, {})


def test_a_trial_without_an_owner_is_taken_over_only_when_it_is_old(
    fields: Fields, here: Root, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields["tune"] |= {"storage": database, "trials": 1}
    space, storage = space_of(here, fields), open_database(database, "test")
    search = open_search(storage, the_case(space), space.tune, space.iterations, None)
    search.ask(fixed_distributions=space.distributions())  # another ROOT's, which is about to say so
    controller, place = tuned_here(here, fields, storage=storage)
    assert (place.trained, controller.elsewhere()) == ([], {"": 1})
    monkeypatch.setattr("harness.tuning.storage.ASKING_SECONDS", -1.0)
    controller, place = tuned_here(here, fields, storage=storage)
    assert (len(place.trained), controller.elsewhere()) == (1, {})


def test_a_search_in_a_file_goes_on_without_the_identity_of_its_root(fields: Fields, here: Root) -> None:
    with pytest.raises(Killed):
        tuned_here(here, changed(fields, parallel=2), kill_at())
    (here.path / "root.json").unlink()
    controller, _ = tuned_here(here, fields)
    assert outcomes(records_of(controller)) == ["finished"] * 2
    assert not controller.elsewhere()


def test_runs_of_an_ended_trial_are_cancelled_before_its_result_is_stored(fields: Fields, here: Root) -> None:
    fields["tune"] |= {"seeds": [0, 1], "search": {"optimiser.lr": {"low": 1e30, "high": 1.0001e30}}}
    train(here, with_rate(fields, 1e30, iterations=2))  # the first seed, which diverges
    with pytest.raises(Killed):
        tuned_here(here, fields, kill_at())
    (second,) = Control(here.study("tiny/tune") / "control.jsonl").cancelled()
    trial = space_of(here, fields).trial("prefix_simba", "xs", {RATE: 1e30})
    assert second == trial.points[1].run_id


def test_a_file_that_ends_in_half_a_line_is_read_and_continued(fields: Fields, here: Root) -> None:
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
    assert len(records_of(controller)) == 2


def test_another_length_or_other_seeds_begin_a_search_of_their_own(fields: Fields, here: Root) -> None:
    def name_with(**change: Any) -> str:
        return the_case(space_of(here, changed(fields, **change))).name

    more = {"search": {"optimiser.lr": {"choices": [0.01, 0.02, 0.03]}}}
    even = {"search": {"optimiser.lr": {"low": 1e-3, "high": 1e-1}}}
    for change in ({"iterations": 4}, {"seeds": [0, 1]}, TWO_RATES, more, even):
        assert name_with(**change) != name_with()
    for change in ({"trials": 9}, {"search": {"optimiser.lr": {"low": 1e-4, "high": 1.0, "log": True}}}):
        assert name_with(**change) == name_with()


class Crowded(InThisProcess):
    """A runner that would train all trials at once."""

    is_crowded = True
    most = 0

    def capacity(self, series: int) -> int:
        return 100

    def look(self, points: Sequence[GridPoint]) -> list[RunStatus]:
        self.most = max(self.most, len(points))
        return super().look(points)


@pytest.mark.parametrize(("parallel", "most"), [(None, 4), (6, 6)])
def test_where_many_fit_trials_start_a_few_at_a_time_unless_the_study_says_otherwise(
    fields: Fields, here: Root, parallel: int | None, most: int
) -> None:
    fields["tune"] |= {"trials": 6, "parallel": parallel}
    space, place = space_of(here, fields), Crowded(here, "tiny/tune")
    folder = here.study("tiny") / "tune"
    folder.mkdir(parents=True)
    controller = Controller(space, open_journal(folder), place, say_nothing)
    controller.run()
    assert (len(records_of(controller)), place.most) == (6, most)
