"""Decisions which task trains where next, from waiting tasks, groups and nodes alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.dispatch.packing import (
    Feed,
    Group,
    Node,
    Request,
    Start,
    Stop,
    WaitingTask,
    decide,
    fits_nowhere,
)
from tests.harness.packings import Simulation, lower_bound, mixed

TWO_NODES = [Node("a", 4), Node("b", 4)]
SHARES = (1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 8)


def task(key: str, ranks: int = 1, seconds: float = 60.0, share: float = 1.0) -> WaitingTask:
    return WaitingTask(key, Request(ranks, 1, share), seconds)


def group(key: str, ranks: int, node: str, busy: float | None = None) -> Group:
    return Group(key, Request(ranks, 1), (node,) * ranks, busy)


requests = st.one_of(
    st.builds(Request, st.sampled_from([1, 2, 3, 4, 8]), st.just(1), st.just(1.0)),
    st.builds(Request, st.just(1), st.just(1), st.sampled_from(SHARES)),
    st.builds(Request, st.sampled_from([1, 2]), st.just(2), st.just(2.0)),  # two cores a rank
)
mixes = st.lists(st.tuples(requests, st.floats(0.0, 100.0)), min_size=1, max_size=14).map(
    lambda found: [WaitingTask(f"p{at:02}", *each) for at, each in enumerate(found)]
)
places = st.lists(st.integers(1, 8), min_size=1, max_size=3).map(
    lambda sizes: [Node(f"n{at}", float(size)) for at, size in enumerate(sizes)]
)


@settings(max_examples=60)
@given(mixes, places, st.sampled_from([0.0, 5.0, 50.0]))
def test_every_task_is_done_and_no_device_holds_more_than_it_can(
    tasks: list[WaitingTask], nodes: list[Node], startup: float
) -> None:
    left_out = fits_nowhere(tasks, nodes)
    fitting = [each for each in tasks if each not in left_out]
    if not fitting:
        assert decide(tasks, [], nodes, startup) == []
        return
    simulation = Simulation(fitting, nodes, startup)  # checks each step against the devices
    simulation.run()
    assert set(simulation.done) == {each.key for each in fitting}


@settings(max_examples=20)
@given(mixes, places, st.randoms(use_true_random=False))
def test_decisions_do_not_depend_on_the_order_of_tasks_and_nodes(
    tasks: list[WaitingTask], nodes: list[Node], shuffled: random.Random
) -> None:
    said = decide(tasks, [], nodes, 5.0)
    shuffled.shuffle(tasks)
    shuffled.shuffle(nodes)
    assert decide(tasks, [], nodes, 5.0) == said


@settings(max_examples=20)
@given(mixes, st.floats(10.0, 200.0))
def test_tasks_of_a_vanished_node_are_done_on_the_others(tasks: list[WaitingTask], moment: float) -> None:
    fitting = [each for each in tasks if each not in fits_nowhere(tasks, TWO_NODES[:1])]
    if not fitting:
        return
    simulation = Simulation(fitting, TWO_NODES, 5.0, vanishing=moment)
    simulation.run()
    assert set(simulation.done) == {each.key for each in fitting}


def test_a_series_of_a_node_or_less_stays_on_one_node() -> None:
    nodes = [Node("a", 4), Node("b", 4), Node("c", 4)]
    held = [group("g1", 2, "a", 50.0), group("g2", 2, "b", 50.0)]
    (start,) = decide([task("p", ranks=4)], held, nodes, 5.0)
    assert start == Start(task("p", ranks=4), ("c",) * 4)
    (start,) = decide([task("q", ranks=2)], held, nodes[:2], 5.0)
    assert isinstance(start, Start)
    assert len(set(start.nodes)) == 1


def test_a_larger_series_takes_whole_nodes() -> None:
    (start,) = decide([task("p", ranks=8)], [], TWO_NODES, 5.0)
    assert start == Start(task("p", ranks=8), ("a",) * 4 + ("b",) * 4)
    (start,) = decide([task("p", ranks=6)], [], TWO_NODES, 5.0)
    assert isinstance(start, Start)
    assert sorted(start.nodes) == ["a"] * 3 + ["b"] * 3


def test_a_task_that_fits_nowhere_is_named_and_delays_no_other() -> None:
    waiting = [task("large", ranks=16), task("small")]
    assert fits_nowhere(waiting, TWO_NODES) == waiting[:1]
    assert fits_nowhere(waiting, []) == waiting
    assert [
        action.task.key for action in decide(waiting, [], TWO_NODES, 5.0) if isinstance(action, Start)
    ] == ["small"]


def test_shares_are_packed_on_one_device_before_another_is_opened() -> None:
    waiting = [task(f"p{at}", share=1 / 4) for at in range(3)] + [task("whole", ranks=3)]
    starts = decide(waiting, [], [Node("a", 4)], 0.0)
    assert sorted(each.task.key for each in starts if isinstance(each, Start)) == ["p0", "p1", "p2", "whole"]


def test_two_halves_on_two_devices_are_not_a_device() -> None:
    halves = [Group(f"h{device}", Request(1, 1, 0.5), ("a",), 100.0, device=str(device)) for device in (0, 1)]
    nodes = [Node("a", 2)]
    assert decide([task("whole")], halves, nodes, 5.0) == []
    (start,) = decide([task("half", share=0.5)], halves, nodes, 5.0)
    assert start == Start(task("half", share=0.5), ("a",))


def test_a_warm_group_is_fed_the_longest_series_of_its_shape() -> None:
    idle = [group("g", 2, "a")]
    waiting = [task("short", 2, 10.0), task("long", 2, 30.0), task("other", 1, 99.0)]
    actions = decide(waiting, idle, [Node("a", 2)], 5.0)
    assert actions == [Feed(idle[0], waiting[1])]
    assert decide([], idle, [Node("a", 2)], 5.0) == []


def test_an_idle_group_without_tasks_of_its_shape_is_stopped_for_others() -> None:
    idle = [group("g", 2, "a")]
    waiting = [task("one"), task("two")]
    assert decide(waiting, idle, [Node("a", 2)], 5.0) == [
        Stop(idle[0]),
        Start(waiting[0], ("a",)),
        Start(waiting[1], ("a",)),
    ]


def test_a_task_waits_for_a_group_that_is_idle_sooner_than_a_new_one_would_start() -> None:
    busy = [group("g", 1, "a", busy=2.0)]
    assert decide([task("p")], busy, TWO_NODES, 20.0) == []
    assert decide([task("p")], busy, TWO_NODES, 1.0) != []


@pytest.mark.parametrize("startup", [0.0, 20.0])
def test_a_large_series_gets_its_devices_however_many_small_ones_wait(startup: float) -> None:
    # Small ones end one by one, so four devices of a node are never free by themselves.
    tasks = [task(f"s{at:02}", 1, 50.0 + at) for at in range(60)]
    held = [group(f"g{at}", 1, "ab"[at // 4], busy=5.0 + 6 * at) for at in range(8)]
    large = task("large", 4, 300.0)
    simulation = Simulation([*tasks, large], TWO_NODES, startup)
    simulation.begin(held)
    end = simulation.run()
    assert simulation.done["large"] < end
    before = sum(each.busy or 0.0 for each in held) / 8
    assert end < 1.15 * (before + lower_bound([*tasks, large], TWO_NODES)) + startup


@pytest.mark.parametrize("startup", [0.0, 2.0, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_mixes_of_three_requests_end_within_a_tenth_of_the_bound(seed: int, startup: float) -> None:
    tasks = mixed(seed)
    end = Simulation(tasks, TWO_NODES, startup).run()
    assert end / lower_bound(tasks, TWO_NODES) < 1.10


@pytest.mark.parametrize("seed", range(3))
def test_estimates_that_are_wrong_by_architecture_cost_little(seed: int) -> None:
    tasks = mixed(seed)
    factors = random.Random(seed)
    wrong = [factors.uniform(0.5, 2.0) for _ in range(3)]
    actual = {each.key: each.seconds * wrong[at % 3] for at, each in enumerate(tasks)}
    simulation = Simulation(tasks, TWO_NODES, 10.0, actual=actual)
    assert simulation.run() / lower_bound(tasks, TWO_NODES, actual) < 1.25
