"""Decisions of Ray's dispatcher without a Ray; test_ray_here.py runs it on a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.dispatch import packing
from harness.dispatch.base import Handle, SubmitTarget, Task
from harness.dispatch.packing import Node, Start, WaitingTask
from harness.dispatch.ray import dispatcher as ray
from harness.dispatch.ray.cluster import START_SECONDS
from harness.dispatch.ray.group import Placement, RankGroup, _Rank
from harness.dispatch.ray.host import RayDown
from harness.dispatch.supervise import JobSupervisor
from harness.dispatch.worker_process import GRACE_SECONDS
from harness.record.jobs import JobState
from harness.record.journal import read_progress
from harness.record.root import Root, write_run
from harness.record.status import StatusReader
from harness.train.stopping import EXIT_BAD_NODE, EXIT_PREEMPTED
from ssmttm.errors import InputError
from tests.harness.journals import begin_series, registered
from tests.studies import Fields


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The nodes of a Ray with no device in use: a head without GPUs, and a node with four."""
    nodes = [Node("head", 0.0), Node("a", 4.0)]
    monkeypatch.setattr(ray, "_nodes", lambda kind: nodes)
    monkeypatch.setattr(ray.RayDispatcher, "_look_after_nodes", lambda self: nodes)
    monkeypatch.setattr(ray, "available", dict)
    return nodes


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The dispatcher's clock, seconds."""
    now = [0.0]
    monkeypatch.setattr(ray.time, "monotonic", lambda: now[0])
    return now


def opened(study_dir: Path) -> ray.RayDispatcher:
    return ray.RayDispatcher(study_dir, SubmitTarget("ray")).__enter__()


@pytest.mark.parametrize(
    ("ranks", "is_lost", "problem", "said"),
    [
        (8, False, InputError, "series s: takes 8 GPUs of one node, .* the nodes of this Ray have 4$"),
        (1, True, RayDown, r"^Ray has had no node for \d+ s"),
    ],
    ids=["too-large", "lost"],
)
def test_a_series_without_a_node_is_refused_when_saving_and_a_slow_start_of_another_would_be_over(
    tmp_path: Path,
    nodes: list[Node],
    now: list[float],
    ranks: int,
    is_lost: bool,
    problem: type[Exception],
    said: str,
) -> None:
    dispatcher = opened(tmp_path)
    handles = dispatcher.submit([Task(series_id="s", run_dirs=(), ranks=ranks)])
    if is_lost:
        nodes.pop()
    for seconds in (10.0, 20.0, GRACE_SECONDS + START_SECONDS):
        now[0] = seconds
        assert dispatcher.views(handles)[handles[0].job_id].state == "queued"
    now[0] = 20 + GRACE_SECONDS + START_SECONDS
    with pytest.raises(problem, match=said):
        dispatcher.views(handles)


def test_gpus_are_found_even_if_their_node_is_being_replaced(
    tmp_path: Path, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    back = nodes.pop()
    monkeypatch.setattr(ray.time, "sleep", lambda seconds: nodes.append(back))
    assert opened(tmp_path).on_gpus


def test_a_rank_with_more_threads_than_any_node_has_cores_takes_all_of_a_node(
    tmp_path: Path, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes[:] = [Node("a", 2.0), Node("b", 4.0)]
    asked: list[float] = []

    def note(tasks: Sequence[WaitingTask], *_: object) -> list[Start]:
        asked.extend(task.request.share for task in tasks)
        return []

    monkeypatch.setattr(ray, "_nodes", lambda kind: nodes if kind == "CPU" else [])
    monkeypatch.setattr(ray.packing, "decide", note)
    dispatcher = opened(tmp_path)
    dispatcher.views(
        dispatcher.submit(
            [Task(series_id="many", run_dirs=(), threads=16), Task(series_id="few", run_dirs=(), threads=3)]
        )
    )
    assert asked == [4.0, 3.0]


def test_devices_of_others_are_left_out_and_devices_just_released_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, free = [0.0], {"a": {"GPU": 4.0}, "b": {}}
    monkeypatch.setattr(ray, "available", lambda: free)
    monkeypatch.setattr(ray.time, "monotonic", lambda: now[0])
    others = ray.Others("GPU")

    def left(**ours: float) -> list[float]:
        nodes = [Node("a", 4.0), Node("b", 4.0), Node("new", 4.0)]
        return [node.devices for node in others.remaining(nodes, ours)]

    assert left() == [4.0, 0.0, 4.0]
    free |= {"a": {"GPU": 0.6667}, "b": {"GPU": 2.0}}
    assert left(a=10 / 3) == [4.0, 2.0, 4.0]  # ours, and others' are let go at once
    free["a"]["GPU"] = 3.5  # ours were released: Ray has not reported all of it yet, or another user has it
    now[0] += 1
    assert left(a=0.0) == [4.0, 2.0, 4.0]
    now[0] += 2 * ray.SETTLE_SECONDS
    assert left(a=0.0) == [3.0, 2.0, 4.0]


class FailingOn:
    """A group whose ranks end at once, on these nodes because their node failed."""

    is_ready = is_leaving = False
    key, device, began, fed = "group", None, 0.0, 0.0

    def __init__(self, bad: set[str], log: list[str]) -> None:
        self.bad, self.log = bad, log
        self.handle: Handle | None = None
        self.node_failure: tuple[str, str] | None = None
        self.stall: str | None = None
        self.is_gone = False

    def __call__(
        self, request: packing.Request, nodes: tuple[str, ...], *_: object, **__: object
    ) -> FailingOn:
        made = FailingOn(self.bad, self.log)
        made.request, made.nodes = request, nodes  # type: ignore[attr-defined]
        self.log.append(nodes[0])
        return made

    def feed(self, handle: Handle) -> None:
        self.handle = handle

    def poll(self) -> tuple[Handle, JobState]:
        assert self.handle is not None
        (node,) = self.nodes  # type: ignore[attr-defined]
        is_bad = node in self.bad
        self.node_failure, self.is_gone = ((node, "Xid 79") if is_bad else None), True
        return self.handle, JobState.LOST if is_bad else JobState.ENDED


@pytest.mark.parametrize(
    ("bad", "tried", "end"),
    [({"a"}, ["a", "b"], None), ({"a", "b", "c"}, ["a", "b", "c"], "it met 3 bad nodes: node-a (")],
    ids=["one", "three"],
)
def test_no_further_group_is_placed_on_a_bad_node_and_the_run_is_not_blamed(
    tmp_path: Path,
    study_fields: Fields,
    nodes: list[Node],
    monkeypatch: pytest.MonkeyPatch,
    bad: set[str],
    tried: list[str],
    end: str | None,
) -> None:
    nodes[:] = [Node(name, 1.0) for name in "abcd"]
    log: list[str] = []
    monkeypatch.setattr(ray, "RankGroup", FailingOn(bad, log))
    monkeypatch.setattr(ray, "_names", lambda: {name: f"node-{name}" for name in "abcd"})
    root = Root(tmp_path / "runs")
    study = registered(root, study_fields)
    point = study.points[0]
    begin_series(root, point.run).close()
    task = Task(series_id=point.series_id, run_dirs=(write_run(root, point.run),))
    dispatcher = opened(root.study(study.study.name))
    supervisor = JobSupervisor(root.control(study.study.name), dispatcher)
    for _ in tried:
        supervisor.watch_over(dispatcher.submit([task]))
        while not supervisor.is_empty:
            supervisor.watch()
    assert log == tried
    result = read_progress(task.run_dirs[0]).result
    assert (result is None) == (end is None)
    assert end is None or str(result and result["reason"]).startswith(end)
    assert set(StatusReader(root, study.study.name).control.read()[-1]) >= {"node", "reason", "t"}


@pytest.mark.parametrize(
    ("log", "is_new", "statuses", "failed"),
    [
        ("rank-1.log", True, (EXIT_PREEMPTED, EXIT_BAD_NODE), "b"),
        ("workers-a.log", True, (-6, None), "a"),
        ("rank-1.log", False, (-6, -9), None),
        ("rank-1.log", True, (EXIT_PREEMPTED, EXIT_PREEMPTED), None),
    ],
    ids=["its-own-words", "aborted", "an-earlier-failure", "told-to-stop"],
)
def test_a_group_blames_the_node_whose_rank_logged_its_failure_since_it_was_fed(
    tmp_path: Path, log: str, is_new: bool, statuses: tuple[int | None, ...], failed: str | None
) -> None:
    line = "CUDA error: uncorrectable ECC error encountered"
    task = Task(series_id="s", run_dirs=(tmp_path / "runs" / "r",))
    group = RankGroup.__new__(RankGroup)
    group.handle, group.log_dir, group.node_failure = Handle(task, "1"), tmp_path, None
    group._is_unplaced, group._lengths = False, {}
    group._ranks = [
        _Rank(None, Placement(node, ()), status=status) for node, status in zip("ab", statuses, strict=True)
    ]
    paths = {path.name: path for path, _ in group._logs()}
    paths[log].parent.mkdir(parents=True, exist_ok=True)
    paths[log].write_text(f"Traceback\n{line}\n")
    if not is_new:
        group._lengths = {paths[log]: paths[log].stat().st_size}
    state = group._state_at_end()
    assert group.node_failure == (None if failed is None else (failed, line))
    assert (state is JobState.PREEMPTED) == (set(statuses) == {EXIT_PREEMPTED})
