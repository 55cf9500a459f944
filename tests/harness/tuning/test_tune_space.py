"""A search: its keys and their ranges, the Runs of a trial, and `lr: tuned` in a study."""

from __future__ import annotations

import copy
import json
import math
import sys
from itertools import product
from pathlib import Path

import pytest

from harness.common.validation import validate
from harness.record.registry import ResolvedStudy, resolve, resolve_registered
from harness.record.root import Root, read_model_if_there, write_model
from harness.record.status import RunState, StatusReader
from harness.study.schema import Study, load_study
from harness.study.tune import RateLaw, Tuned, TunedArchitecture, TunedSize
from harness.tuning.session import keep
from harness.tuning.space import Space
from harness.tuning.transfer import Note
from ssmttm.errors import InputError
from ssmttm.model.flops import parameter_count
from tests.conftest import REPOSITORY, Command, Write, files_below
from tests.harness.bundles import exported, imported
from tests.harness.journals import registered
from tests.harness.trainer import train
from tests.harness.tuner import space_of, with_rate
from tests.studies import Fields

RATE = {"low": 1e-3, "high": 1e-1, "log": True}


@pytest.fixture
def fields(study_fields: Fields) -> Fields:
    """A study that tunes one size of two."""
    study_fields["grid"]["sizes"]["s"] = {"n_blocks": 1, "d_model": 24}
    study_fields["tune"] = {"sizes": ["xs"], "trials": 3, "search": {"optimiser.lr": RATE}}
    return study_fields


def resolved(fields: Fields, root: Root) -> ResolvedStudy:
    return resolve(validate(Study, fields, "test"), root, "test")


def run_ids(fields: Fields, root: Root) -> list[str]:
    return [point.run_id for point in resolved(fields, root).points]


LR = "optimiser.lr"
SEARCHES: dict[str, tuple[Fields, str]] = {
    "unknown key": ({"optimiser.lrr": RATE}, "optimiser.lrr: unknown key; did you mean 'lr'?"),
    "unknown section": ({"optimizer.lr": RATE}, "tune.search.optimizer.lr: cannot be searched"),
    "key of the grid": ({"grid.seeds": RATE}, "tune.search.grid.seeds: cannot be searched"),
    "held-out clips": ({"eval_clips": {"low": 1, "high": 9}}, "except the clips of the held-out loss"),
    "low above high": ({LR: {"low": 1.0, "high": 0.1}}, "low 1 is not below high 0.1"),
    "low at high": ({LR: {"low": 0.1, "high": 0.1}}, "low 0.1 is not below high 0.1"),
    "no logarithm": ({LR: RATE | {"low": 0}}, "low 0 has no logarithm"),
    "no range": ({LR: {"low": 0.1}}, "is not a range; give low and high, or choices"),
    "text for a number": ({LR: RATE | {"low": "1m"}}, "low: '1m': is not a number"),
    "one choice": ({LR: {"choices": [1]}}, "fewer than two choices"),
    "half a step": ({"schedule.warmup": {"low": 0.5, "high": 3}}, "warmup: is a whole number"),
    "invalid end": ({"optimiser.beta1": {"low": 0.5, "high": 1.5}}, "beta1: 1.5: input should be less"),
    "encoder": ({"text.encoder": {"choices": ["bytes", "t5"]}}, "encoder: cannot be searched"),
    "invalid choice": ({"model.ssm_head_dim": {"choices": [8, 7, 16]}}, "does not divide into heads of 7"),
    "key twice": ({LR: RATE, f"training.{LR}": dict(RATE)}, "training.optimiser.lr: is searched twice"),
}
MISTAKES: dict[str, tuple[Fields, str]] = {
    **{name: ({"search": search}, sentence) for name, (search, sentence) in SEARCHES.items()},
    "unknown size": ({"sizes": ["xl"]}, "tune.sizes: 'xl' is not one of the sizes xs, s"),
    "size twice": ({"sizes": ["xs", "xs"]}, "lists an entry twice"),
    "nothing to prune by": ({"pruner": "median"}, "tune.pruner: median: needs losses on the way"),
    "unknown sampler": ({"sampler": "grid"}, "tune.sampler: 'grid'"),
    "no database": ({"storage": "postgresql+nodriver://me:secret@h/x"}, "postgresql+nodriver://me:***@h/x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    mistake: str, fields: Fields, write_study: Write, ssmscale: Command, tmp_path: Path
) -> None:
    change, sentence = MISTAKES[mistake]
    fields["tune"] |= change
    study = write_study(fields)
    before = files_below(tmp_path)
    said = ssmscale("tune", study, "--on", "local")
    said.assert_refused(sentence)
    assert len(said.err.splitlines()) == 1
    assert "secret" not in said.err
    assert files_below(tmp_path) == before


def test_without_optuna_the_extra_to_install_is_named_and_nothing_is_written(
    fields: Fields, write_study: Write, ssmscale: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(fields)
    before = files_below(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    ssmscale("tune", study, "--on", "local").assert_refused("pip install 'ssmscale[tune]'")
    assert files_below(tmp_path) == before


def test_pruning_needs_an_evaluation_before_the_decay(fields: Fields, here: Root) -> None:
    fields["tune"]["pruner"] = "median"
    fields["grid"]["iterations"] = [10]  # the decay begins at 8
    fields["tracking"]["eval_every"] = 8
    assert space_of(here, fields).cases
    fields["tracking"]["eval_every"] = 9
    with pytest.raises(InputError, match="has none in its 8 steps before the decay"):
        space_of(here, fields)


def test_a_trial_is_the_run_that_a_study_with_its_values_has(fields: Fields, here: Root) -> None:
    space = space_of(here, fields)
    trial = space.trial("prefix_simba", "s", space.values({"training.optimiser.lr": 0.01234567}))
    assert {point.run_id for point in trial.points} < set(run_ids(with_rate(fields, 0.0123), here))


def test_a_range_is_never_left_by_rounding_and_choices_are_not_rounded(fields: Fields, here: Root) -> None:
    fields["tune"]["search"] = {
        "optimiser.beta2": {"low": 0.9, "high": 0.9999},
        "optimiser.lr": {"choices": [0.01, 0.012345]},
    }
    space = space_of(here, fields)
    values = space.values({"training.optimiser.lr": 0.012345, "training.optimiser.beta2": 0.99963})
    (point,) = space.trial("prefix_simba", "xs", values).points
    assert (point.run.optimiser.lr, point.run.optimiser.beta2) == (0.012345, 0.9999)


def test_a_size_is_known_by_its_own_model_whatever_is_searched_there(fields: Fields, here: Root) -> None:
    fields["tune"]["search"]["model.d_state"] = {"choices": [8, 32]}
    (case,) = space_of(here, fields).cases
    own = resolved(fields, here).points[0].run.model
    assert case.n_params == parameter_count(own).n_params


@pytest.mark.parametrize("where", ["size", "architecture", "both"])
def test_searched_values_override_those_of_a_size(where: str, fields: Fields, here: Root) -> None:
    if where in {"size", "both"}:
        fields["grid"]["sizes"]["xs"] |= {"optimiser": {"lr": 0.5}, "d_state": 16}
    if where in {"architecture", "both"}:
        own = {"optimiser": {"lr": 0.6}, "model": {"d_state": 4}, "sizes": {"xs": {"optimiser": {"lr": 0.7}}}}
        fields["grid"]["architectures"]["prefix_simba"] = own
    fields["tune"]["search"]["model.d_state"] = {"choices": [8, 32]}
    space = space_of(here, fields)
    values = {"training.optimiser.lr": 0.02, "model.d_state": 32}
    (point,) = space.trial("prefix_simba", "xs", values).points
    assert (point.run.optimiser.lr, point.run.model.d_state) == (0.02, 32)


def test_the_first_trials_fill_each_dimension_evenly(fields: Fields, here: Root) -> None:
    fields["tune"]["search"]["schedule.warmup"] = {"low": 0, "high": 3}
    space = space_of(here, fields)
    design = space.design(8, "name")
    places = [math.log(one["training.optimiser.lr"] / 1e-3) / math.log(100) for one in design]
    assert sorted(int(place * 8) for place in places) == list(range(8))
    assert {one["training.schedule.warmup"] for one in design} <= {0, 1, 2, 3}
    assert space.design(8, "name") == design != space.design(8, "other")


def test_the_shipped_search_covers_the_small_sizes_of_both_architectures(here: Root) -> None:
    facts = "corpus.facts={n_codebooks: 2, codebook_size: 256, frames: 256, clips: 1000}"
    path = REPOSITORY / "sweeps" / "tune_lr.yaml"
    cases = [
        (case.architecture, case.size) for case in Space(load_study(path, [facts]), here, str(path)).cases
    ]
    assert cases == list(product(("prefix_simba", "cross_transformer"), ("xs", "s", "m")))


# -- lr: tuned


@pytest.fixture
def tuned(fields: Fields, here: Root) -> Tuned:
    """A tuned.json for the study: xs was searched, and the rate falls with the root of the parameters."""
    n_params = parameter_count(resolved(fields, here).points[0].run.model).n_params
    law = RateLaw(
        intercept=math.log(0.02) + 0.5 * math.log(n_params),
        slope=-0.5,
        slope_ci95=(-0.6, -0.4),
        covariance=(0.0, 0.0, 0.0),
    )
    measured = {"lr": 0.03, "ci95": (0.02, 0.04), "n_trials": 5, "best": {}, "best_loss": 1.0}
    size = TunedSize.model_validate({"size": "xs", "n_params": n_params, "d_model": 16, **measured})
    found = Tuned(
        study="tiny",
        scale_by="n_params",
        iterations=5,
        fingerprint="0" * 64,
        architectures={"prefix_simba": TunedArchitecture(sizes=(size,), law=law)},
    )
    write(found, here)
    return found


def write(tuned: Tuned, root: Root) -> None:
    write_model(root.study("tiny") / "tuned.json", tuned)


def left_to_tuning(fields: Fields) -> Fields:
    return with_rate(fields, "tuned")


def test_a_tuned_rate_is_a_number_before_a_run_is_identified(
    fields: Fields, here: Root, tuned: Tuned
) -> None:
    points = resolved(left_to_tuning(fields), here).points
    rates = {point.size: point.run.optimiser.lr for point in points}
    ratio = parameter_count(points[-1].run.model).n_params / parameter_count(points[0].run.model).n_params
    assert rates["xs"] == 0.03  # as measured, and not as the law has it
    assert rates["s"] == pytest.approx(0.02 / math.sqrt(ratio), rel=5e-3)
    assert rates["s"] == float(f"{rates['s']:.3g}")
    numbers = copy.deepcopy(fields)
    for size, rate in rates.items():
        numbers["grid"]["sizes"][size]["optimiser"] = {"lr": rate}
    assert [point.run_id for point in points] == run_ids(numbers, here)


def test_a_size_that_gives_a_number_keeps_it(fields: Fields, here: Root, tuned: Tuned) -> None:
    fields["grid"]["sizes"]["xs"]["optimiser"] = {"lr": 0.5}
    points = resolved(left_to_tuning(fields), here).points
    assert [point.run.optimiser.lr for point in points if point.size == "xs"] == [0.5, 0.5]


def test_a_submitted_study_keeps_the_rates_it_was_submitted_with(
    fields: Fields, here: Root, tuned: Tuned
) -> None:
    left, other = left_to_tuning(fields), tuned.model_copy(update={"fingerprint": "1" * 64})
    before = registered(here, left).points
    space, notes = space_of(here, left), list[Note]()
    assert keep(space, other, notes) is False
    assert [note.code for note in notes] == ["tuned_kept"]
    assert read_model_if_there(here.study("tiny") / "tuned.json", Tuned) == tuned
    assert keep(space, tuned, notes) is True
    (here.study("tiny") / "tuned.json").unlink()
    held = resolve_registered(here, "tiny")
    assert held is not None
    assert held.points == resolved(left, here).points == before
    assert keep(space_of(here, left), other, []) is False
    (here.study("tiny") / "study.json").unlink()
    assert keep(space, other, notes) is True


def test_a_tuned_study_goes_to_another_machine_with_its_rates(
    fields: Fields, here: Root, tuned: Tuned, tmp_path: Path
) -> None:
    fields["grid"]["iterations"] = [2]
    del fields["grid"]["sizes"]["s"]
    fields["training"]["schedule"] = {"warmup": 1}
    train(here, left_to_tuning(fields))
    there = Root(tmp_path / "there")
    imported(exported(here, left_to_tuning(fields), tmp_path / "tuned.zip"), there)
    held = resolve_registered(there, "tiny")
    assert held is not None
    own = run_ids(left_to_tuning(fields), here)
    assert [point.run_id for point in held.points] == own
    assert run_ids(left_to_tuning(fields), there) == own  # its YAML means the same there
    assert {row.state for row in StatusReader(there, "tiny").read(held.points)} == {RunState.DONE}


def test_a_study_without_tuned_rates_is_registered_without_them_and_takes_no_changes(
    fields: Fields, here: Root, tuned: Tuned, ssmscale: Command
) -> None:
    registered(here, fields)
    assert "tuned" not in json.loads((here.study("tiny") / "study.json").read_text())
    changed = ssmscale("tune", "tiny", "--root", here.path, "--on", "local", "--set", "tune.trials=99")
    changed.assert_refused("--set works with a YAML file")


@pytest.mark.parametrize("lack", ["everything", "the architecture", "the law"])
def test_a_rate_that_was_not_tuned_is_refused_in_one_sentence(
    lack: str, fields: Fields, here: Root, tuned: Tuned, write_study: Write, ssmscale: Command
) -> None:
    if lack == "everything":
        (here.study("tiny") / "tuned.json").unlink()
        sentence = "grid.sizes.xs (prefix_simba): optimiser: lr: tuned: the study has not been tuned"
    elif lack == "the architecture":
        fields["grid"]["architectures"] = {"cross_transformer": None}
        sentence = "grid.sizes.xs (cross_transformer): optimiser: lr: tuned: only prefix_simba (xs) was tuned"
    else:
        alone = tuned.architectures["prefix_simba"].model_copy(update={"law": None})
        write(tuned.model_copy(update={"architectures": {"prefix_simba": alone}}), here)
        sentence = "grid.sizes.s (prefix_simba): optimiser: lr: tuned: only prefix_simba (xs) was tuned"
    before = files_below(here.path)
    for verb in (("plan",), ("submit", "--on", "local")):
        said = ssmscale(verb[0], write_study(left_to_tuning(fields)), *verb[1:])
        said.assert_refused(sentence)
        assert len(said.err.splitlines()) == 1
    assert files_below(here.path) == before


def test_a_search_of_the_rate_needs_no_rate_yet(fields: Fields, here: Root) -> None:
    assert space_of(here, left_to_tuning(fields)).cases
    fields["tune"]["search"] = {"schedule.warmup": {"low": 1, "high": 3}}
    with pytest.raises(
        InputError, match=r"tuned: has no value before tuning; search training\.optimiser\.lr"
    ):
        space_of(here, left_to_tuning(fields))
