"""The size of an allocation for packed Series, and the choice of the Series to pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from harness.common.format import Estimate
from harness.common.validation import validate
from harness.plan.allocation import choose_allocation, describe_packing, describe_shares, share_out
from harness.plan.cluster import Profile
from harness.plan.plan import PlannedRun
from harness.submit.monitor import planned
from ssmttm.errors import InputError
from tests.studies import Fields, tiny_study

Series = Callable[..., list[PlannedRun]]

FIELDS: Fields = {
    "name": "c",
    "partitions": ["gpu"],
    "nodes": 4,
    "gpus": 8,
    "gpu_memory_gib": 80,
    "cores": 64,
    "memory_gib": 512,
    "limits": {"hours": 24},
}
GPUS, CORES = (validate(Profile, {**FIELDS, "gpus": gpus}, "test") for gpus in (8, 0))


@pytest.fixture(scope="module")
def series(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Series:
    """Planned Series of these hours each, at most twice as long, on so many devices."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "study.yaml").write_text(yaml.safe_dump(tiny_study(tiny_corpus)))
    one = planned(str(folder / "study.yaml"), folder / "runs", None, None)[1].runs[0]

    def make(*hours: float, ranks: int = 1, fraction: float = 1.0, threads: int = 1) -> list[PlannedRun]:
        layout = one.layout.model_copy(update={"ranks": ranks, "threads": threads})
        resources = replace(one.size.resources, layout=layout, gpu_fraction=fraction)
        return [
            replace(
                one,
                status=replace(one.status, series_id=f"{ranks}-{fraction}-{threads}-{index}"),
                size=replace(one.size, resources=resources),
                hours=Estimate(h / 2, h, 2 * h),
            )
            for index, h in enumerate(hours)
        ]

    return make


def devices(runs: Sequence[PlannedRun], profile: Profile = GPUS, nodes: int | None = None) -> tuple[int, int]:
    shape = choose_allocation(runs, profile, nodes).shape
    return shape.nodes, shape.ranks_a_node


def test_no_more_gpus_are_taken_than_have_work_until_the_longest_series_ends(series: Series) -> None:
    assert devices(series(4.0, 2.0, 1.0, 1.0)) == (1, 2)  # 8 hours of work, and 4 that nothing shortens
    assert devices(series(*[4.0] * 20)) == (3, 7)
    assert devices(series(*[4.0] * 400)) == (4, 8)  # all that the profile gives a job


def test_work_of_minutes_and_series_that_share_a_gpu_take_few_gpus(series: Series) -> None:
    assert devices(series(*[0.1] * 20)) == (1, 4)
    assert devices(series(*[4.0] * 16, fraction=0.125)) == (1, 2)


def test_cores_are_the_devices_where_there_are_no_gpus(series: Series) -> None:
    found = choose_allocation(series(*[4.0] * 6, threads=4), CORES)
    assert (found.shape.nodes, found.shape.ranks_a_node, found.shape.threads) == (1, 24, 1)
    assert "24 cores" in str(found)


def test_an_allocation_takes_its_share_of_a_nodes_cores_and_memory(series: Series) -> None:
    shape = choose_allocation(series(4.0, 4.0), GPUS).shape
    assert (shape.ranks_a_node * shape.threads, shape.memory_gib) == (16, 128 + 2.0)
    assert choose_allocation(series(*[4.0] * 400), GPUS).shape.memory_gib == 512


def test_the_nodes_a_user_names_are_taken_as_far_as_series_fill_them(series: Series) -> None:
    assert devices(series(*[0.1] * 20), nodes=2) == (2, 8)
    assert devices(series(*[0.1] * 6), nodes=2) == (2, 3)
    assert devices(series(0.1), nodes=2) == (1, 1)
    assert devices(series(0.1, ranks=4), nodes=2) == (1, 4)
    assert devices(series(*[0.1] * 4, fraction=0.25), nodes=2) == (1, 1)
    wide = [*series(*[0.1] * 2), *series(0.1, ranks=4)]
    assert devices(wide, nodes=2) == (2, 4)  # the four ranks of one series stay together


def test_the_requested_time_is_enough_for_any_order(series: Series) -> None:
    found = choose_allocation(series(4.0, 2.0, 1.0, 1.0), GPUS)
    assert found.hours == pytest.approx(16 / 2 + 8 + 0.25)
    assert choose_allocation(series(*[4.0] * 400), GPUS).hours == 24  # the rest after a requeue


def test_a_series_that_the_nodes_do_not_hold_is_named(series: Series) -> None:
    with pytest.raises(InputError, match=r"--nodes 1: xs \(prefix_simba\) takes 16 GPUs, and there are 8"):
        choose_allocation(series(1.0, ranks=16), GPUS, nodes=1)


def test_a_rank_has_its_cores_on_one_node(series: Series) -> None:
    wide = series(1.0, ranks=3, threads=40)  # 120 cores of nodes that have 64
    assert devices(wide, CORES) == (3, 64)
    said = r"--nodes 2: xs \(prefix_simba\) has 3 ranks of 40 cores, which take 3 nodes"
    with pytest.raises(InputError, match=said):
        choose_allocation(wide, CORES, nodes=2)


def test_nodes_are_only_those_that_some_partition_gives_a_job(series: Series) -> None:
    narrow = validate(Profile, {**FIELDS, "partitions": {"gpu": {"nodes": 2, "hours": 4}}}, "test")
    found = choose_allocation(series(*[4.0] * 400), narrow)
    assert (found.shape.nodes, found.hours) == (2, 4)


def test_packing_on_a_whole_cluster_is_described_with_its_devices(series: Series) -> None:
    said = ["2 runs in 2 series packed on Ray at http://h:8265: 4 nodes with 8 GPUs each"]
    assert describe_packing(series(1.0, 1.0), GPUS.cluster(), "Ray at http://h:8265") == said
    assert describe_packing([], GPUS.cluster(), "Ray at http://h:8265") == []


def test_auto_packs_what_needs_less_than_a_node(series: Series) -> None:
    small, whole, larger = series(1.0, 1.0), series(1.0, ranks=8), series(1.0, ranks=16)
    assert share_out([*small, *whole, *larger], GPUS, "auto") == (small, [*whole, *larger])
    assert share_out([*small, *whole], GPUS, "ray") == ([*small, *whole], [])
    assert share_out([*small, *whole], GPUS, "slurm") == ([], [*small, *whole])
    assert describe_shares([*small, *whole], GPUS, "auto") == [
        "2 runs in 2 series packed in one job of 4.25 h on 1 node with 2 GPUs",
        "1 run in 1 series in jobs of their own",
    ]
