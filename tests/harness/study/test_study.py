"""A valid study becomes a grid; a mistake becomes a sentence with file, key and value."""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from harness.common.validation import read_yaml
from harness.record.registry import register, resolve, resolve_registered
from harness.record.root import Root
from harness.study.grid import GridPoint
from harness.study.schema import ResourceChoice, load_study
from ssmttm.errors import InputError
from ssmttm.model.config import ModelConfig
from ssmttm.model.flops import parameter_count
from tests.conftest import Command, Write, files_below, flip_a_byte
from tests.harness.conftest import PlanOf
from tests.studies import Fields

FACTS = {"n_codebooks": 2, "codebook_size": 64, "frames": 50, "clips": 48}
PointsOf = Callable[..., tuple[GridPoint, ...]]


def put(fields: Fields, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        fields = fields[part]
    fields[last] = value


@pytest.fixture
def points_of(write_study: Write) -> PointsOf:
    """The grid of a study's fields, after changes as `--set` takes them."""

    def points(fields: Fields, *changes: str) -> tuple[GridPoint, ...]:
        path = write_study(fields)
        return resolve(load_study(path, changes), Root(Path("runs")), str(path)).points

    return points


def models_of(points: Iterable[GridPoint]) -> dict[tuple[str, str], ModelConfig]:
    return {(point.architecture, point.size): point.run.model for point in points}


def test_the_grid_is_architecture_by_size_by_seed_by_iterations(
    study_fields: Fields, points_of: PointsOf
) -> None:
    study_fields["grid"] |= {
        "architectures": {"prefix_simba": None, "cross_transformer": None},
        "sizes": {"xs": {"n_blocks": 1, "d_model": 16}, "s": {"n_blocks": 2, "d_model": 16}},
        "replicates": [{"sizes": ["xs"], "seeds": [1, 2]}],
    }
    points = points_of(study_fields)
    assert len(points) == 2 * (3 + 1) * 2
    assert {point.run.seed for point in points if point.size == "s"} == {0}
    assert len({point.run.run_id for point in points}) == len(points)
    assert len({point.run.series_id for point in points}) == len(points) / 2


def test_other_entries_of_a_grid_and_resources_never_change_a_run(
    study_fields: Fields, points_of: PointsOf
) -> None:
    before = {point.run_id for point in points_of(study_fields)}
    study_fields["grid"]["iterations"] = [5, 7, 10, 20]
    study_fields["grid"]["sizes"]["s"] = {"n_blocks": 2, "d_model": 16}
    study_fields["tracking"]["log_every"] = 3
    study_fields["resources"] = {"threads": 2, "micro_batch": 1, "keep_last": 3, "keep_best": True}
    assert before < {point.run_id for point in points_of(study_fields)}


def test_a_size_in_parameters_is_the_same_run_as_in_blocks(study_fields: Fields, points_of: PointsOf) -> None:
    put(study_fields, "grid.sizes", {"s": {"n_blocks": 3, "d_model": 32}})
    plain = points_of(study_fields)
    n_params = parameter_count(plain[0].run.model).n_params
    asked = {"n_params": n_params * 1.01, "tolerance": 0.05, "reference_n_params": 1e9}
    for size in ({"d_model": 32} | asked, {"n_blocks": 3} | asked, {"d_model": 32, "aspect": 10.7}):
        put(study_fields, "grid.sizes", {"s": size})
        assert points_of(study_fields) == plain


def test_a_ladder_makes_a_size_of_each_width_depth_or_target(
    study_fields: Fields, points_of: PointsOf
) -> None:
    study_fields["grid"] |= {
        "sizes": {
            "wide": {"d_model": [32, 64], "aspect": 16, "optimiser": {"lr": 1e-4}},
            "deep": {"n_blocks": [3, 6], "aspect": 9},
            "big": {"n_params": [50e3, 0.2e6], "aspect": 16, "tolerance": 0.3},
        },
        "replicates": [{"sizes": ["wide-d32"], "seeds": [1]}],
    }
    found = models_of(points_of(study_fields))
    shapes = {size: (model.n_blocks, model.d_model) for (_, size), model in found.items()}
    assert list(shapes) == ["wide-d32", "wide-d64", "deep-b3", "deep-b6", "big-50k", "big-200k"]
    assert [shapes[f"wide-d{width}"] for width in (32, 64)] == [(2, 32), (4, 64)]
    assert [shapes[f"deep-b{blocks}"] for blocks in (3, 6)] == [(3, 24), (6, 56)]  # heads are 8 wide
    put(study_fields, "grid.sizes.wide.d_model", [32])
    longer = models_of(points_of(study_fields, "grid.sizes.wide.d_model=[32, 64]"))
    assert longer == found


def test_a_submitted_study_has_the_runs_of_its_file(
    study_fields: Fields, write_study: Write, tmp_path: Path
) -> None:
    study_fields["grid"] |= {
        "architectures": {"prefix_simba": None, "cross_transformer": {"iterations": [5, 40]}},
        "sizes": {"l": {"d_model": [32, 64], "aspect": 16}, "s": {"n_params": 60000, "d_model": 32}},
    }
    path, root = write_study(study_fields), Root(tmp_path / "runs")
    submitted = resolve(load_study(path), root, str(path))
    register(submitted)
    again = resolve_registered(root, "tiny")
    assert again is not None
    assert again.points == submitted.points


def test_an_architecture_and_a_size_may_have_their_own_iterations_model_and_optimiser(
    study_fields: Fields, write_study: Write, points_of: PointsOf
) -> None:
    size = {"n_params": None, "n_blocks": 2, "optimiser": {"lr": 1e-4}}
    own = {"iterations": [5, 10, 40], "model": {"ff_mult": 4}, "sizes": {"xs": size}}
    study_fields["grid"] |= {
        "architectures": {"prefix_simba": None, "cross_transformer": own},
        "sizes": {"xs": {"n_params": 60000, "d_model": 32, "optimiser": {"weight_decay": 0.5}}},
    }
    points = points_of(study_fields)
    assert [(point.architecture, point.run.iterations) for point in points] == [
        *(("prefix_simba", count) for count in (5, 10)),
        *(("cross_transformer", count) for count in (5, 10, 40)),
    ]
    assert load_study(write_study(study_fields)).grid.n_runs == len(points)
    for run, shape, lr in ((points[0].run, (4, 2), 3e-3), (points[-1].run, (2, 4), 1e-4)):
        assert (run.model.n_blocks, run.model.ff_mult) == shape
        assert (run.optimiser.lr, run.optimiser.weight_decay) == (lr, 0.5)


def test_a_size_may_have_resources_of_its_own_and_stays_the_same_run(
    study_fields: Fields, plan_of: PlanOf
) -> None:
    study_fields["grid"] |= {
        "sizes": {"xs": {"n_blocks": 1, "d_model": 16}, "s": {"n_blocks": 2, "d_model": 16}},
        "iterations": [5],
    }
    study_fields["resources"] = {"zero_stage": 1}
    before = plan_of(study_fields)["runs"]
    study_fields["grid"]["sizes"]["s"]["resources"] = {"ranks": 2}
    small, large = plan_of(study_fields)["runs"]
    assert [small["run_id"], large["run_id"]] == [run["run_id"] for run in before]
    assert (small["gpus"], small["zero_stage"], large["gpus"], large["zero_stage"]) == (1, 1, 2, 1)


def test_keys_that_an_architecture_does_not_use_are_no_part_of_its_runs(
    study_fields: Fields, points_of: PointsOf
) -> None:
    study_fields["grid"]["architectures"] = {"prefix_simba": None, "cross_transformer": None}
    before = points_of(study_fields)
    study_fields["model"]["d_state"] = 16
    changed = [
        after.run_id != point.run_id for after, point in zip(points_of(study_fields), before, strict=True)
    ]
    assert changed == [point.architecture == "prefix_simba" for point in before]


def test_set_changes_a_key_of_the_study_even_below_an_empty_one(
    study_fields: Fields, write_study: Write
) -> None:
    put(study_fields, "grid.sizes.xs", {"n_params": 30000, "d_model": 32})
    changes = ["training.optimiser.lr=1e-4", "grid.iterations=[3, 6]", "grid.sizes.xs.n_params=120e3"]
    below_empty = "grid.architectures.prefix_simba.model.d_state=16"
    study = load_study(write_study(study_fields), [*changes, below_empty])
    assert (study.training.optimiser.lr, study.grid.iterations) == (1e-4, (3, 6))
    assert study.grid.sizes["xs"].n_params == 120e3
    assert next(iter(study.grid.architectures.values())).model.d_state == 16


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("traning", {}, ["traning", "unknown key", "'training'"]),
        ("training.optimiser.lrr", 1, ["training.optimiser.lrr", "unknown key", "'lr'"]),
        ("grid.sizes.xs.n_block", 3, ["grid.sizes.xs.n_block", "unknown key", "'n_blocks'"]),
        ("training.batch", "many", ["training.batch", "'many'"]),
        ("training.batch", 8.0, ["training.batch", "8.0"]),
        ("training.batch", True, ["training.batch", "True"]),
        ("training.optimiser.lr", "fast", ["training.optimiser.lr", "'fast'"]),
        ("training.optimiser.lr", -1.0, ["training.optimiser.lr", "-1.0"]),
        ("grid.iterations", [], ["grid.iterations", "[]"]),
        ("grid.sizes", {}, ["grid.sizes", "{}"]),
        ("grid.architectures", {}, ["grid.architectures", "{}"]),
        ("grid.architectures", {"transformer": None}, ["grid.architectures", "transformer"]),
        ("grid.architectures", {"cross_transfomer": None}, ["did you mean 'cross_transformer'?"]),
        ("grid.architectures", {"cross_transfomer": 5}, ["a mapping of keys to values"]),
        ("grid.iterations", 5, ["grid.iterations: 5: input should be a list"]),
        ("training.batch", 1e3, ["training.batch: 1000.0", "; write 1000"]),
        ("grid.iterations", [10, 5], ["grid.iterations", "rise", "[10, 5]"]),
        ("grid.sizes.xs.d_model", 20, ["grid.sizes.xs", "d_model", "heads of 16"]),
        ("grid.replicates", [{"sizes": ["xl"], "seeds": [1]}], ["replicates", "'xl'", "xs"]),
        ("name", "a/b", ["name: 'a/b'"]),
        ("name", "../up", ["name: '../up'"]),
        ("name", "-x", ["name: '-x'"]),
        ("name", "$(touch hacked)", ["name: '$(touch hacked)'"]),
        ("name", "it's", ["name", "it's", "a name has at most 64 letters"]),
        ("name", "a\nb", ["name", "a\\nb"]),
        ("training.schedule.warmup", 9, ["warmup", "9", "4 steps"]),
        ("corpus", {"path": "nowhere/at-all"}, ["corpus.path", "nowhere/at-all"]),
        ("corpus.codec", "dac", ["corpus.codec", "'dac'", "'rvq'"]),
        ("corpus.frames", 51, ["corpus.frames", "51", "50"]),
        ("corpus.facts", FACTS | {"n_codebooks": 4}, ["facts.n_codebooks", "4"]),
        ("corpus.facts", FACTS | {"frames": 60}, ["facts.frames: 60", "has 50", "build the corpus"]),
        ("corpus", {"path": "elsewhere", "frames": 51, "facts": FACTS}, ["corpus.frames: 51", "50 frames"]),
        ("resources", {"ranks": 3}, ["ranks", "3"]),
        ("grid.sizes.xs.resources", {"ranks": 3}, ["grid.sizes.xs", "ranks", "3"]),
        ("grid.sizes.xs.resources", {"keep_last": 2}, ["grid.sizes.xs.resources", "keep_last"]),
        ("resources", {"keep_last": 0}, ["resources.keep_last", "0"]),
        ("resources", {"keep_best": "perhaps"}, ["resources.keep_best", "'perhaps'"]),
        ("grid.sizes.xs.n_blocks", True, ["n_blocks", "True"]),
        ("grid.sizes.xs.optimiser", {"lr": None}, ["grid.sizes.xs", "lr", "None"]),
        ("grid.sizes.twin", {"n_blocks": 1, "d_model": 16}, ["twin", "same run as xs"]),
        ("grid.sizes.xs.n_params", 1e6, ["xs.n_params", "n_blocks 1, d_model 16, n_params 1,000,000"]),
        ("grid.sizes.xs", {"n_params": "72M", "d_model": 16}, ["grid.sizes.xs.n_params", "'72M'"]),
        ("grid.sizes.xs", {"d_model": [16, 32], "n_params": [1e6]}, ["xs", "d_model and n_params"]),
        ("grid.sizes.xs", {"d_model": [16, 16], "aspect": 8}, ["xs.d_model", "[16, 16]", "lists one size"]),
        ("grid.sizes.xs", {"d_model": [], "aspect": 8}, ["xs.d_model", "[]", "at least one"]),
        ("grid.sizes.xs", {"d_model": [16, "b"], "aspect": 8}, ["grid.sizes.xs-db.d_model", "'b'"]),
        ("grid.sizes.xs", {"d_model": [16, 20], "aspect": 8}, ["xs-d20", "heads of 16"]),
        ("grid.architectures.prefix_simba", {"iterations": [9, 8]}, ["prefix_simba.iterations", "rise"]),
        ("grid.architectures.prefix_simba.iterations", [2, 8], ["warmup", "1 steps", "iterations.0 = 2"]),
        ("tracking", {"uri": "./mlruns"}, ["tracking.uri", "./mlruns"]),
    ],
)
def test_a_mistake_is_reported_in_a_sentence_and_nothing_is_written(
    study_fields: Fields,
    write_study: Write,
    ssmscale: Command,
    tmp_path: Path,
    key: str,
    value: Any,
    said: list[str],
) -> None:
    if "heads" in str(said):
        study_fields["model"]["ssm_head_dim"] = 16
    study_fields["grid"]["architectures"] = {"prefix_simba": {}}
    put(study_fields, key, value)
    path = write_study(study_fields)
    before = files_below(tmp_path)
    ssmscale("submit", path, "--on", "local").assert_refused(path.name, *said)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 010", ["line 1", "010: is 8 in YAML; write 10, or '010' with its quotes for a text"]),
        ("a: [1, 1:40]", ["line 1", "1:40: is 100 in YAML; write a number without colons, or '1:40'"]),
        ("a: &a [x, x]\nb: [*a, *a]\n", ["line 2", "alias *a"]),
        ("name: x\nname: y\n", ["line 2", "'name'", "twice"]),
        ("name: [\n", ["study.yaml"]),
        ("- a\n- b\n", ["mapping"]),
        ("", ["mapping"]),
        ("name: !!python/object/apply:os.system ['true']\n", ["study.yaml"]),
        ("1: 2\n", ["keys must be text"]),
        ("name: x\n" + "y: z\n" * 300_000, ["larger than"]),
        ("[" * 5000, ["study.yaml"]),
    ],
)
def test_invalid_and_hostile_yaml_is_refused(
    ssmscale: Command, tmp_path: Path, text: str, said: list[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    ssmscale("plan", path).assert_refused(*said)


def test_a_study_with_the_facts_of_a_missing_corpus_is_planned_but_not_submitted(
    study_fields: Fields, write_study: Write, ssmscale: Command, tmp_path: Path
) -> None:
    study_fields["corpus"] = {"path": "elsewhere", "facts": FACTS}
    path = write_study(study_fields)
    before = files_below(tmp_path)
    planned = ssmscale("plan", path)
    assert planned.status == 0
    assert "corpus_unknown" in planned.out
    ssmscale("submit", path, "--on", "local").assert_refused("elsewhere")
    assert files_below(tmp_path) == before


def test_a_damaged_shard_is_named_and_nothing_is_trained(
    study_fields: Fields, write_study: Write, ssmscale: Command, tmp_path: Path, tiny_corpus: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_corpus, copy)
    shard = next((copy / "shards").glob("train-*.npy"))
    flip_a_byte(shard)
    study_fields["corpus"]["path"] = str(copy)
    ssmscale("submit", write_study(study_fields), "--on", "local").assert_refused(shard.name)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_study_is_named(ssmscale: Command) -> None:
    ssmscale("status", "no-such-study").assert_refused("no-such-study")


def test_words_and_numbers_are_read_as_they_look(tmp_path: Path) -> None:
    """YAML 1.1 takes no and on for false and true, a date for no text, and 1e3 for no number."""
    path = tmp_path / "any.yaml"
    path.write_text("{name: no, on: 2026-01-01, count: 1_000, rate: 1e3, small: 1.0e-3, hex: 0x10, is: true}")
    read = {
        "name": "no",
        "on": "2026-01-01",
        "count": 1000,
        "rate": 1e3,
        "small": 1e-3,
        "hex": 16,
        "is": True,
    }
    assert read_yaml(path) == read
    assert ResourceChoice.model_validate(
        {"keep_best": "yes", "activation_checkpointing": "off"}
    ) == ResourceChoice(keep_best=True, activation_checkpointing=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.batch=many", "'many': input should be a valid integer"),
        ("training={batch: many}", "'many': input should be a valid integer"),
        ("grid.iterations=[x]", "'x': input should be a valid integer"),
        ("grid.architectures={cross_transfomer: }", "did you mean 'cross_transformer'?"),
    ],
)
def test_a_mistake_of_an_option_is_reported_once_and_names_the_option(
    study_fields: Fields, write_study: Write, change: str, said: str
) -> None:
    path = write_study(study_fields)
    with pytest.raises(InputError) as refused:
        load_study(path, ["grid.seeds=[1]", change])
    lines = str(refused.value).splitlines()
    own = [line for line in lines if line.startswith(f"--set {change}: ")]
    assert any(said in line for line in own)
    assert "is empty" not in str(refused.value)
    put(study_fields, "training.batch", "few")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: training.batch: 'few'"):
        load_study(write_study(study_fields), ["grid.seeds=[1]"])
