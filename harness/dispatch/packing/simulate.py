"""How a packing would go on to its end if a policy decided everything: what a decision looks ahead with.

List scheduling in simulated time: whenever groups are free, shapes are served in the policy's order, each with its
longest piece. A shape that finds no room has it kept free for it on the nodes where that comes about soonest, so that
no stream of small pieces starves a large one; what ends before then may still use it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.dispatch.packing.devices import Need, Place, Room

EPSILON = 1e-9


@dataclass(frozen=True)
class Policy:
    """Which shape is served first."""

    targets: tuple[int, ...] | None
    """Groups of each shape that come before any others; None where no shape has a share of its own."""
    order: str
    """Of shapes that are otherwise equal: `longest` (piece), `widest`, `narrowest`, or `heaviest` (work left)."""
    keeps_warm: bool = True
    """Whether an idle group whose shape has pieces left is kept from shapes that come before its own."""


@dataclass
class Lane:
    """A group: of which shape, where, and until when it is busy."""

    shape: int
    place: Place
    until: float
    number: int
    """Of the real group; -1 for one that the schedule starts."""


@dataclass(frozen=True)
class Outlook:
    """What a policy would come to, and what it would do now."""

    end: float
    starts: int
    total: float
    """Sum of the ends of all pieces."""
    actions: tuple[tuple[str, int, Place | None], ...]
    """(start, shape, place), (feed, group, None), (stop, group, None), in order."""

    @property
    def score(self) -> tuple[float, int, float]:
        """Less is better."""
        return (round(self.end, 6), self.starts, self.total)


@dataclass(frozen=True)
class Shapes:
    """The shapes of a packing, by number."""

    needs: tuple[Need, ...]
    nodes: tuple[int, ...]
    """On how many nodes a group of each has to be; 0 where there is no room for it at all."""
    queues: tuple[tuple[float, ...], ...]
    """Seconds of the pieces of each, longest first."""
    work: tuple[tuple[float, ...], ...] = field(init=False)
    """Device-seconds of each queue from a position on."""

    def __post_init__(self) -> None:
        work = []
        for need, queue in zip(self.needs, self.queues, strict=True):
            sums = [0.0]
            for seconds in reversed(queue):
                sums.append(sums[-1] + seconds * need.width)
            work.append(tuple(reversed(sums)))
        object.__setattr__(self, "work", tuple(work))


class Schedule:
    """One packing from now to its end under one policy."""

    def __init__(
        self, shapes: Shapes, room: Room, lanes: Sequence[Lane], startup: float, policy: Policy
    ) -> None:
        self._shapes, self._startup, self._policy = shapes, startup, policy
        self._room = room.copy()
        kinds = range(len(shapes.needs))
        self._next = [0 for _ in kinds]
        self._left = sum(len(queue) for queue in shapes.queues)
        self._idle: list[list[Lane]] = [[] for _ in kinds]
        self._busy: list[list[Lane]] = [[] for _ in kinds]
        self._events: list[tuple[float, int, Lane]] = []
        self._count = 0
        self._actions: list[tuple[str, int, Place | None]] = []
        self._end = self._total = 0.0
        self._starts = 0
        for real in lanes:
            lane = Lane(real.shape, real.place, real.until, real.number)
            if lane.until > 0:
                self._occupy(lane, lane.until)
            else:
                self._idle[lane.shape].append(lane)

    def run(self, most: float) -> Outlook | None:
        """To the end; None where that would be later than `most`."""
        self._serve(0.0)
        actions = tuple(self._actions)
        while self._events:
            now = self._events[0][0]
            while self._events and self._events[0][0] <= now + EPSILON:
                lane = heapq.heappop(self._events)[2]
                self._busy[lane.shape].remove(lane)
                self._idle[lane.shape].append(lane)
            if self._left:
                self._serve(now)
            if self._end > most + EPSILON:
                return None
        # What is held by nobody the schedule knows may keep a piece waiting for ever: the others need not.
        end = math.inf if self._left else self._end
        return Outlook(end, self._starts, self._total, actions)

    def _serve(self, now: float) -> None:
        """Feed and start all that the policy would have begin now."""
        blocked: set[int] = set()
        promised: dict[int, float] = {}  # of lanes that are kept free: until when
        taken: list[tuple[int, int]] = []
        while self._left:
            for kind in self._order():
                if kind in blocked:
                    continue
                if self._feed(kind, now, promised) or self._start(kind, now, promised):
                    break
                blocked.add(kind)
                if not promised and not taken and self._something_is_free():
                    taken = self._promise(kind, now, promised)
            else:
                break
        for node, devices in taken:
            self._room.whole[node] += devices

    def _something_is_free(self) -> bool:
        return any(self._idle) or any(free > 0 for free in self._room.whole)

    def _order(self) -> list[int]:
        """Shapes with pieces left, those to be served first in front."""
        policy, shapes = self._policy, self._shapes
        keys = []
        for kind, queue in enumerate(shapes.queues):
            at = self._next[kind]
            if at >= len(queue):
                continue
            groups = len(self._idle[kind]) + len(self._busy[kind])
            beyond = policy.targets is not None and groups >= policy.targets[kind]
            width = shapes.needs[kind].width
            if policy.order == "longest":
                rank = -queue[at]
            elif policy.order == "heaviest":
                rank = -shapes.work[kind][at] / (groups + 1) / width
            else:
                rank = -width if policy.order == "widest" else width
            keys.append((beyond and not self._idle[kind], rank, -queue[at], kind))
        keys.sort()
        return [key[-1] for key in keys]

    def _feed(self, kind: int, now: float, promised: dict[int, float]) -> bool:
        queue, at = self._shapes.queues[kind], self._next[kind]
        for lane in self._idle[kind]:
            if now + queue[at] <= promised.get(id(lane), math.inf):
                self._idle[kind].remove(lane)
                self._begin(kind, lane, now + queue[at])
                if lane.number >= 0:
                    self._actions.append(("feed", lane.number, None))
                return True
        return False

    def _start(self, kind: int, now: float, promised: dict[int, float]) -> bool:
        """Start a group, where more pieces wait than groups are free before it would be up."""
        shapes = self._shapes
        soon = sum(
            lane.until <= now + self._startup and id(lane) not in promised for lane in self._busy[kind]
        )
        if len(shapes.queues[kind]) - self._next[kind] <= soon:
            return False
        place = self._find(kind)
        if place is None:
            place = self._make_room(kind, promised)
            if place is None:
                return False
        need = shapes.needs[kind]
        lane = Lane(kind, self._room.take(need, place), 0.0, -1)
        self._starts += 1
        self._actions.append(("start", kind, place))
        self._begin(kind, lane, now + self._startup + shapes.queues[kind][self._next[kind]])
        return True

    def _find(self, kind: int) -> Place | None:
        nodes = self._shapes.nodes[kind]
        if nodes == 1:
            return self._room.find(self._shapes.needs[kind])
        return self._room.find_across(self._shapes.needs[kind], nodes) if nodes else None

    def _make_room(self, kind: int, promised: dict[int, float]) -> Place | None:
        """Stop idle groups of other shapes, as few as make room for one of this; None where all would not."""
        needs = self._shapes.needs
        stopped: list[Lane] = []
        place = None
        for lane in self._spare(kind, promised):
            self._room.give(needs[lane.shape], lane.place)
            stopped.append(lane)
            place = self._find(kind)
            if place is not None:
                break
        for lane in stopped:  # those that need not go stay
            self._room.take(needs[lane.shape], lane.place)
            if place is not None and (other := self._find(kind)) is not None:
                place = other
                continue
            if place is None:
                continue
            self._room.give(needs[lane.shape], lane.place)
            self._idle[lane.shape].remove(lane)
            if lane.number >= 0:
                self._actions.append(("stop", lane.number, None))
        return place if place is None else self._find(kind)

    def _spare(self, kind: int, promised: dict[int, float]) -> list[Lane]:
        """Idle groups that a group of this shape may be started in place of, those first that nobody will miss."""
        policy, found = self._policy, []
        for other, lanes in enumerate(self._idle):
            if not lanes or other == kind:
                continue
            pieces = len(self._shapes.queues[other]) - self._next[other]
            if policy.keeps_warm and policy.targets is not None:
                kept = min(pieces, max(0, policy.targets[other] - len(self._busy[other])))
            else:
                kept = pieces if policy.keeps_warm else 0
            free = [lane for lane in lanes if id(lane) not in promised]
            found += free[: max(0, len(free) - kept)]
        width = self._shapes.needs[kind].width
        return sorted(found, key=lambda lane: abs(self._shapes.needs[lane.shape].width - width))

    def _promise(self, kind: int, now: float, promised: dict[int, float]) -> list[tuple[int, int]]:
        """Keep free for a shape what it waits for, where that is all there soonest; returns the free devices kept."""
        need = self._shapes.needs[kind]
        count = self._shapes.nodes[kind]
        if need.part or not count:
            return []
        here = sum(lane.until <= now + self._startup for lane in self._busy[kind])
        if len(self._shapes.queues[kind]) - self._next[kind] <= here:
            return []  # its own groups will serve it
        wanted = -(-need.ranks // count) * need.devices
        there: list[list[tuple[float, int, Lane]]] = [[] for _ in self._room.whole]
        for lanes in (*self._idle, *self._busy):
            for lane in lanes:
                holds = self._shapes.needs[lane.shape].devices
                for node, ranks in lane.place.ranks if holds else ():
                    there[node].append((lane.until, ranks * holds, lane))
        soonest = sorted(
            (self._ready(held, free, wanted, now), node)
            for node, (held, free) in enumerate(zip(there, self._room.whole, strict=True))
        )[:count]
        when = soonest[-1][0]
        if len(soonest) < count or when == math.inf:
            return []
        if when <= now:
            return []  # warm groups that the policy keeps are in the way: they are not to stand idle for it
        taken = []
        for _, node in soonest:
            have = min(max(0, self._room.whole[node]), wanted)
            self._room.whole[node] -= have
            taken.append((node, have))
            for _, devices, lane in there[node]:
                if have >= wanted:
                    break
                have += devices
                promised[id(lane)] = when
        return taken

    def _ready(self, held: list[tuple[float, int, Lane]], free: int, wanted: int, now: float) -> float:
        """When so many devices of a node are free; brings the groups there into the order in which they end."""
        held.sort(key=lambda entry: entry[0])
        have = max(0, free)
        if have >= wanted:
            return now
        for until, devices, _ in held:
            have += devices
            if have >= wanted:
                return max(now, until)
        return math.inf

    def _begin(self, kind: int, lane: Lane, end: float) -> None:
        self._next[kind] += 1
        self._left -= 1
        self._total += end
        self._occupy(lane, end)

    def _occupy(self, lane: Lane, end: float) -> None:
        lane.until = end
        self._end = max(self._end, end)
        self._count += 1
        heapq.heappush(self._events, (end, self._count, lane))
        self._busy[lane.shape].append(lane)
