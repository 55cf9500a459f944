"""The plan: exact counts, the savings of trunks, and the JSON that other programs read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from harness.cli import submit as submit_verb
from harness.plan.cluster import Limits, choose_layout
from harness.plan.plan import check_room
from harness.record.journal import read_progress
from harness.record.registry import resolve
from harness.record.root import Launch, Root, write_launch
from harness.study.run import Run
from harness.study.schema import load_study
from harness.submit.monitor import planned
from harness.submit.target import backends_of, target_of
from ssmttm.codec.facts import CodecFacts
from ssmttm.corpus.spec import BuildSpec
from ssmttm.errors import InputError
from ssmttm.model.flops import parameter_count
from tests.conftest import REPOSITORY, Command, Write
from tests.harness.conftest import PlanOf
from tests.harness.journals import registered, write_finished
from tests.harness.trainer import losses, series_folder, train, undisturbed
from tests.studies import Fields

FACTS = {"n_codebooks": 2, "codebook_size": 64, "frames": 50}
ROW = """
run_id series architecture n_params n_params_non_embedding iterations tokens flops seed state nodes gpus
zero_stage micro_batch accumulation memory_gib wall_hours gpu_hours disk_gib
"""


def test_the_document_has_what_other_programs_read(study_fields: Fields, plan_of: PlanOf) -> None:
    plan = plan_of(study_fields)
    assert set(plan) == {"study", "sizes", "runs", "totals", "design"}
    row = plan["runs"][0]
    assert set(ROW.split()) <= set(row)
    assert (row["state"], row["tokens"]) == ("new", 5 * 8 * 50 * 2)
    assert plan["totals"]["series"] == 1
    assert plan["totals"]["disk_gib"] == pytest.approx(sum(run["disk_gib"] for run in plan["runs"]))
    assert plan["totals"]["disk_peak_gib"] > plan["totals"]["disk_gib"] > 0


def test_a_shared_trunk_is_paid_for_once(study_fields: Fields, plan_of: PlanOf) -> None:
    study_fields["grid"]["iterations"] = [10, 20, 40]
    totals = plan_of(study_fields)["totals"]
    # Trunk to 32 steps and decays of 2, 4 and 8: 46 steps where 70 would be taken alone, and one start for three.
    assert 1 / 3 < totals["gpu_hours"] / totals["gpu_hours_independent"] < 46 / 70


def test_finished_runs_cost_nothing_more(study_fields: Fields, plan_of: PlanOf) -> None:
    root = Root(Path("runs").absolute())
    write_finished(root, registered(root, study_fields).points)
    study_fields["grid"]["iterations"] = [5, 10, 20]
    plan = plan_of(study_fields)
    assert [run["state"] for run in plan["runs"]] == ["done", "done", "new"]
    assert plan["totals"]["gpu_hours"] == pytest.approx(plan["runs"][2]["gpu_hours"])
    assert plan["totals"]["gpu_hours_independent"] > plan["totals"]["gpu_hours"]


def test_separate_branches_go_on_from_finished_runs_as_successive_ones_do(
    study_fields: Fields, write_study: Write, tmp_path: Path
) -> None:
    study_fields["grid"] |= {"iterations": [1000, 2000, 4000, 8000]}
    study = write_study(study_fields)
    _, fresh = planned(str(study), tmp_path, None, None)
    *shorter, longest = fresh.runs
    assert longest.hours_apart.expected < fresh.longest_path().expected
    assert longest.hours_apart.expected == pytest.approx(longest.hours_alone.expected, abs=1.1 / 3600)
    write_finished(Root(tmp_path), [run.status.point for run in shorter])
    _, made = planned(str(study), tmp_path, None, None)
    alone = made.runs[-1]
    start = alone.size.duration.start.expected / 3600
    assert alone.hours_apart.expected == pytest.approx(alone.hours.expected + start)


def test_failed_and_cancelled_runs_cost_nothing(
    study_fields: Fields, write_study: Write, ssmscale: Command
) -> None:
    study = write_study(study_fields)
    whole = ssmscale("plan", study, "--json").document
    ssmscale("cancel", study, whole["runs"][1]["run_id"])
    left = ssmscale("plan", study, "--json").document
    assert left["totals"]["gpu_hours"] == pytest.approx(whole["runs"][0]["gpu_hours"])


def test_a_corpus_may_have_other_clips_than_were_planned_for(study_fields: Fields, plan_of: PlanOf) -> None:
    def planned(clips: int) -> tuple[list[Fields], dict[str, str]]:
        study_fields["corpus"]["facts"] = FACTS | {"clips": clips}
        plan = plan_of(study_fields)
        return plan["runs"], {note["code"]: note["text"] for note in plan["design"]["notes"]}

    runs, notes = planned(48)
    assert "corpus_facts" not in notes
    others, notes = planned(5000)
    assert others == runs
    assert "48 clips" in notes["corpus_facts"]
    assert "5,000" in notes["corpus_facts"]


def test_planning_fetches_no_encoder_and_submitting_names_a_missing_one(
    study_fields: Fields, write_study: Write, plan_of: PlanOf, ssmscale: Command
) -> None:
    study_fields["text"] = {"encoder": "example/no-such-encoder", "dim": 16}
    plan = plan_of(study_fields)
    assert {(run["run_id"], run["series"]) for run in plan["runs"]} == {(None, None)}
    (text,) = [note["text"] for note in plan["design"]["notes"] if note["code"] == "text_unknown"]
    assert "example/no-such-encoder is not here" in text
    submitted = ssmscale("submit", write_study(study_fields), "--on", "local", "--dry-run")
    submitted.assert_refused("text.encoder")
    study_fields["text"]["fingerprint"] = "1" * 64
    assert None not in {run["run_id"] for run in plan_of(study_fields)["runs"]}


def test_sizes_stand_beside_their_targets_and_published_models(
    study_fields: Fields, write_study: Write, ssmscale: Command
) -> None:
    study_fields["grid"] |= {
        "architectures": {
            "prefix_simba": None,
            "cross_transformer": {"sizes": {"xs": {"reference_n_params": 4e4}}},
        },
        "sizes": {
            "xs": {"n_params": 50e3, "d_model": 32, "tolerance": 0.3},
            "plain": {"n_blocks": 1, "d_model": 16},
        },
    }
    study = write_study(study_fields)
    plan = ssmscale("plan", study, "--json").document
    sizes = {(size["size"], size["architecture"]): size for size in plan["sizes"]}
    planned = {(run["size"], run["architecture"]): run["n_params"] for run in plan["runs"]}
    assert {key: size["n_params"] for key, size in sizes.items()} == planned
    assert list(sizes) == list(product(("xs", "plain"), ("prefix_simba", "cross_transformer")))
    theirs = sizes["xs", "cross_transformer"]
    assert theirs["deviation"] == pytest.approx(theirs["n_params"] / 50e3 - 1)
    assert theirs["reference_deviation"] == pytest.approx(theirs["n_params"] / 4e4 - 1)
    assert sizes["xs", "prefix_simba"]["reference_deviation"] is None
    assert sizes["plain", "prefix_simba"]["deviation"] is None
    line = next(line for line in ssmscale("plan", study).out.splitlines() if "cross_transformer" in line)
    off = [f"{theirs[key]:+.2%}" for key in ("deviation", "reference_deviation")]
    shown = (f"{theirs['n_blocks']}", "32", f"{theirs['n_params']:,}", *off)
    assert tuple(line.split()[2:]) == shown
    del study_fields["grid"]["sizes"]["xs"], study_fields["grid"]["architectures"]["cross_transformer"]
    said = ssmscale("plan", write_study(study_fields)).out
    assert "vs asked" not in said
    assert "vs published" not in said


@pytest.mark.parametrize(
    ("batch", "ranks", "most", "micro", "accumulation"),
    [(32, 1, 32, 32, 1), (32, 2, 32, 16, 1), (32, 2, 5, 4, 4), (12, 3, 3, 2, 2), (7, 7, 4, 1, 1)],
)
def test_the_global_batch_is_met_exactly(
    batch: int, ranks: int, most: int, micro: int, accumulation: int
) -> None:
    layout = choose_layout(batch, ranks, most, 0, 1)
    assert (layout.micro_batch, layout.accumulation) == (micro, accumulation)
    assert micro * accumulation * layout.ranks == batch
    with pytest.raises(InputError, match=rf"batch.*{batch}.*{batch + 1} ranks"):
        choose_layout(batch, batch + 1, most, 0, 1)


def verify(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.verify)


def bytes_below(root: Root) -> int:
    found = (path for path in root.path.rglob("checkpoints/**/*") if path.is_file())
    return sum(path.stat().st_size for path in found if not path.name.endswith(".complete"))


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(1, 0), verify(1, 1), (1, 2), (1, 3), verify(2, 0), verify(2, 1), verify(2, 2), (2, 3)],
)
def test_a_run_leaves_as_much_on_disk_as_planned_and_has_one_loss_on_any_number_of_ranks(
    study_fields: Fields, tmp_path: Path, ssmscale: Command, write_study: Write, stage: int, ranks: int
) -> None:
    study_fields["grid"] |= {"sizes": {"wide": {"n_blocks": 1, "d_model": 256}}, "iterations": [2, 5]}
    study_fields["training"] |= {"batch": 2, "schedule": {"warmup": 0}, "eval_clips": 2}
    study_fields["resources"] = {"ranks": ranks, "zero_stage": stage}
    root = Root(tmp_path / "runs")
    study = write_study(study_fields)
    planned = ssmscale("plan", study, "--json").document
    if ranks == 1:
        train(root, study_fields, zero_stage=stage)
    else:
        submitted = ssmscale("submit", study, "--on", "local")
        assert submitted.status == 0, submitted.err
        assert losses(root, study_fields) == pytest.approx(undisturbed(study_fields), abs=1e-4)
        layout = (read_progress(series_folder(root)).started or {})["layout"]
        assert (layout["ranks"], layout["zero_stage"]) == (ranks, stage)
    assert planned["totals"]["disk_gib"] * 2**30 == pytest.approx(bytes_below(root), rel=0.05)


def test_a_branch_point_two_runs_share_is_counted_once(study_fields: Fields, plan_of: PlanOf) -> None:
    study_fields["training"]["schedule"] = {"warmup": 0, "decay_fraction": 0.9}
    study_fields["grid"]["iterations"] = [5, 6, 20]  # they leave the trunk at 1, 1 and 2
    first, second, third = plan_of(study_fields)["runs"]
    assert first["disk_gib"] == third["disk_gib"] == pytest.approx(4 * second["disk_gib"])


def test_a_disk_too_small_for_the_study_is_noted_with_its_figures(
    study_fields: Fields, write_study: Write, ssmscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, nearly_full = write_study(study_fields), shutil.disk_usage("/")._replace(free=2**16)
    assert "disk_short" not in ssmscale("plan", study).out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
    notes = ssmscale("plan", study, "--json").document["design"]["notes"]
    (note,) = [note["text"] for note in notes if note["code"] == "disk_short"]
    assert "runs has 6.104e-05 GiB free" in note


def test_submit_warns_of_too_little_room_with_both_figures_and_refuses_what_holds_no_checkpoint(
    study_fields: Fields, write_study: Write, ssmscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(study_fields)
    totals = ssmscale("plan", study, "--json").document["totals"]
    free, whole = 2**30 * totals["disk_peak_gib"], shutil.disk_usage("/")
    room = {"free": free * 1.01}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: whole._replace(**room))
    monkeypatch.setattr(submit_verb, "_train", lambda *_: True)
    said = ssmscale("submit", study, "--on", "local")
    assert (said.status, "GiB free" in said.err) == (0, False)
    room["free"] = free * 0.9
    said = ssmscale("submit", study, "--on", "local")
    assert said.status == 0
    assert (
        f"warning: runs has {0.9 * totals['disk_peak_gib']:.4g} GiB free, and training what is left"
        in said.err
    )
    assert f"takes about {totals['disk_peak_gib']:.4g} GiB" in said.err
    room["free"] = 2**10
    shutil.rmtree("runs")
    said = ssmscale("submit", study, "--on", "local")
    assert said.status == 1
    assert "error: runs: its disk is full, and 0." in said.err
    assert "free some space, then the same command goes on from here" in said.err
    assert not Path("runs").exists()


def test_on_a_cluster_every_series_that_trains_at_once_needs_room(
    study_fields: Fields, write_study: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_fields["grid"]["seeds"] = list(range(40))
    resolved, made = planned(str(write_study(study_fields)), None, None, "devcluster")
    target = target_of("slurm", "devcluster")
    assert target.profile is not None
    few = replace(target, profile=target.profile.model_copy(update={"limits": Limits(parallel=2)}))
    counts = [backends_of(one, resolved)[0].count_at_once(40) for one in (target, few)]
    assert counts == [40, 2]
    enough_for_a_node = 2**30 * made.totals()["disk_peak_gib"] * 1.01
    whole = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: whole._replace(free=enough_for_a_node))
    assert [check_room(made, resolved.root, count) is None for count in counts] == [False, True]


def test_more_checkpoints_kept_and_more_series_at_once_need_more_disk(
    study_fields: Fields, plan_of: PlanOf
) -> None:
    def passing(**resources: Any) -> float:
        study_fields["resources"] = resources
        totals = plan_of(study_fields)["totals"]
        return totals["disk_peak_gib"] - totals["disk_gib"]

    study_fields["grid"]["seeds"] = [0, 1, 2]
    one = passing(jobs=1)
    assert passing(jobs=1, keep_last=3) == pytest.approx(2 * one)
    assert passing(jobs=1, keep_last=2, keep_best=True) == pytest.approx(2 * one)
    assert passing(jobs=2) == pytest.approx(min(2, len(os.sched_getaffinity(0))) * one)


def counts(architectures: Sequence[str], **sizes: Sequence[int]) -> dict[tuple[str, str], int]:
    pairs = [(size, *pair) for size, row in sizes.items() for pair in zip(architectures, row, strict=True)]
    return {(size, architecture): count for size, architecture, count in pairs}


TWO = ("prefix_simba", "cross_transformer")
FOUR = ("prefix_simba", "cross_transformer", "prefix_mamba", "cross_simba")
MATCHED = (281_042_176, 279_847_936, 283_759_168, 287_019_712)
"""24, 22, 38 and 18 blocks of width 1024, to the unit; the first equal to the published code."""
PARAMETERS = {
    "scaling_down": counts(
        TWO,
        full=MATCHED[:2],
        half=(141_965_440, 141_368_320),
        quarter=(72_427_072, 78_423_040),
        eighth=(37_657_888, 40_655_872),
    ),
    "convergence": counts(TWO, full=MATCHED[:2]),
    "variants": counts(FOUR, full=MATCHED, quarter=(73_508_740, 70_672_000, 71_910_272, 70_012_670)),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_papers_studies_are_planned_without_corpus_and_encoder_to_the_parameter(
    name: str, ssmscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = REPOSITORY / "sweeps" / f"{name}.yaml"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = ssmscale("plan", sweep, "--cluster", "h100x8", "--json").document
    assert {run["run_id"] for run in plan["runs"]} == {None}
    assert plan["totals"]["gpu_hours"] > 100
    (note,) = [note["text"] for note in plan["design"]["notes"] if note["code"] == "corpus_unknown"]
    assert "google/flan-t5-base was not looked for" in note
    found = {(size["size"], size["architecture"]): size["n_params"] for size in plan["sizes"]}
    assert found == PARAMETERS[name]
    assert ssmscale("plan", sweep).status == 0  # and so it is on this machine
    assert ssmscale("submit", sweep, "--on", "local").status == 2


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_papers_studies_take_the_corpus_that_their_command_builds(name: str) -> None:
    header = (REPOSITORY / "sweeps" / "scaling_down.yaml").read_text()
    asked = dict(re.findall(r"(--segment-seconds|--codebooks) ([\d.]+)", header))
    seconds, codebooks = float(asked["--segment-seconds"]), float(asked["--codebooks"])
    rates = {"sample_rate": 44_100, "frame_rate": 44_100 / 512, "codebook_size": 1024}  # descript/dac_44khz
    codec = CodecFacts(name="dac", fingerprint="0" * 64, n_codebooks=int(codebooks), **rates)
    spec = BuildSpec(source="folder", audio=Path(), codec="dac", segment_seconds=seconds).settled(codec)
    facts = load_study(REPOSITORY / "sweeps" / f"{name}.yaml").corpus.facts
    assert facts is not None
    assert (facts.n_codebooks, facts.codebook_size, facts.frames) == (1, spec.codebook_size, spec.frames)
    assert codec.n_codebooks == facts.n_codebooks


def test_the_studies_of_one_paper_share_the_runs_they_have_in_common_and_the_next_step_keeps_all() -> None:
    def runs(name: str) -> set[Run]:
        path = REPOSITORY / "sweeps" / f"{name}.yaml"
        return {point.run for point in resolve(load_study(path), Root(Path("runs")), str(path)).points}

    def full(name: str) -> set[str]:
        return {
            run.run_id for run in runs(name) if run.model.d_model == 1024 and run.model.n_blocks in {22, 24}
        }

    down, convergence, variants = full("scaling_down"), full("convergence"), full("variants")
    assert (len(down), len(convergence - down), len(variants - down)) == (16, 1, 0)
    small, large = runs("scaling_down"), runs("scale_up")
    assert small < large
    assert min(parameter_count(run.model).n_params for run in large - small) > 5e8


def test_finished_runs_that_were_evaluated_otherwise_on_the_way_are_reused_and_that_is_said(
    here: Root, study_fields: Fields, write_study: Write, ssmscale: Command
) -> None:
    resolved = registered(here, study_fields)
    write_finished(here, resolved.points)
    launch = {
        "corpus": Path("corpus"),
        "control": Path("control.jsonl"),
        "dispatcher": "local",
        "micro_batch": 1,
    }
    write_launch(here, resolved.points[0].series_id, Launch.model_validate(launch))
    study_fields["tracking"]["eval_every"] = 5
    said = "2 finished runs reused that were trained with tracking.eval_every: null, not 5"
    study = write_study(study_fields)
    assert said in " ".join(ssmscale("plan", study, "--root", here.path).out.split())
    assert said in ssmscale("submit", study, "--root", here.path, "--on", "local").err
    study_fields["tracking"]["eval_every"] = None
    assert "reused" not in ssmscale("plan", write_study(study_fields), "--root", here.path).out
