"""When does each op end if bandwidth is shared? One candidate through a simulation of its events.

The same in-order streams as the analytic recurrence, plus what it cannot represent: bandwidth
shared max-min fairly between the ops on a resource, measured interference between agents, finite
queues and background load. Without sharing both engines agree to rounding.

Sharing is fluid. An op that alone takes t seconds and moves b bytes over a resource draws b/t
of it; its speed x ≤ 1 is the largest for which max-min fairness gives every flow its share, and
its progress is the integral of x. Speeds change only when an op starts or ends.

The loop is written out, since a plan runs a hundred of these: processes of simpy took three times as long (tests hold
it to them).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.schedule import Durations, Schedule
from simmem.sim.timeline import Timeline

__all__ = ["Contention", "contends", "events", "fair_speeds", "interference_caps"]

_FINISHED = 1e-15
"""A flow with less work left than this share of the time so far has ended: that much is rounding."""
_ROUNDING = 1e-12
_NEVER = math.inf


@dataclass(frozen=True)
class Contention:
    """What the ops share.

    capacity_bytes_per_s : resource → what all its users together get. [B/s]
    interference : (victim, aggressor, resource), each an agent or a link, → share of its speed the victim keeps.
    background : resource → share of it that other programs take, in [0, 1).
    queue_limit : stream → how many of its ops may be unfinished at once.
    """

    capacity_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    interference: Mapping[tuple[str, str, str], float] = field(default_factory=dict)
    background: Mapping[str, float] = field(default_factory=dict)
    queue_limit: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [
            *((k, v, "a rate above 0") for k, v in self.capacity_bytes_per_s.items() if not v > 0),
            *((k, v, "a share in (0, 1]") for k, v in self.interference.items() if not 0 < v <= 1),
            *((k, v, "a share in [0, 1)") for k, v in self.background.items() if not 0 <= v < 1),
            *((k, v, "at least one op") for k, v in self.queue_limit.items() if v < 1),
        ]
        for key, value, expected in wrong:
            raise SpecError(f"found {value!r}, expected {expected}", key=str(key))

    def available(self, resource: str) -> float:
        """Rate of a resource less its background load. [B/s]"""
        return self.capacity_bytes_per_s[resource] * (1.0 - self.background.get(resource, 0.0))


def contends(dedicated: Timeline, durations: Durations, contention: Contention) -> bool:
    """Whether sharing changes anything, given what happens when nothing is shared.

    False is a proof: where the ops that overlap in the dedicated timeline never ask for more than
    a resource has, full speed is what fair sharing gives all of them at every instant.
    """
    if contention.interference or contention.queue_limit:
        return True
    schedule, occupancy = dedicated.schedule, durations.occupancy_s[:, 0]
    held = dedicated.free_s > dedicated.start_s
    for resource, amount in schedule.bytes.items():
        if resource not in contention.capacity_bytes_per_s:
            continue
        ops = np.flatnonzero(held & (amount[:, 0] > 0)[schedule.op_class])
        kinds = schedule.op_class[ops]
        draw = amount[kinds, 0] / occupancy[kinds]
        when = np.concatenate([dedicated.free_s[ops], dedicated.start_s[ops]])
        change = np.concatenate([-draw, draw])  # at one instant an end comes before a start: lexsort is stable
        drawn = np.cumsum(change[np.argsort(when, kind="stable")])
        if drawn.max(initial=0.0) > contention.available(resource) * (1 + _ROUNDING):
            return True
    return False


def events(schedule: Schedule, durations: Durations, contention: Contention | None = None,
           alone: Timeline | None = None) -> Timeline:
    """Simulate one candidate. Without `contention` every resource is dedicated.

    Parameters
    ----------
    schedule : of one candidate (`Schedule.column`).
    durations : of that candidate, arrays of shape (n_classes, 1).
    alone : what happens when nothing is shared, where that is known (`sim.analytic.dedicated`); simulated when None.
    """
    assert schedule.n_candidates == 1, "the event engine takes one candidate"
    if alone is None:
        alone = _Run(schedule, durations, None).timeline()
    if contention is None or not contends(alone, durations, contention):
        return alone
    return _Run(schedule, durations, contention).timeline()


class _Run:
    """State of one simulation: every stream serves its ops in order, and time moves from one end to the next."""

    def __init__(self, schedule: Schedule, durations: Durations, contention: Contention | None) -> None:
        self.schedule = schedule
        self.classes: list[int] = schedule.op_class.tolist()
        self.occupancy: list[float] = durations.occupancy_s[:, 0].tolist()
        self.latency: list[float] = durations.latency_s[:, 0].tolist()
        self.present: list[bool] = schedule.present[:, 0].tolist()
        self.deps = self._effective_deps()
        self.queues: list[list[int]] = [[] for _ in schedule.streams]
        for op, (k, stream) in enumerate(zip(self.classes, schedule.op_stream.tolist(), strict=True)):
            if self.present[k]:
                self.queues[stream].append(op)
        self.next = [0] * len(self.queues)
        """The place in each queue that is served, or waits."""
        limits = contention.queue_limit if contention else {}
        self.limit = [limits.get(name) for name in schedule.streams]
        self.start, self.free, self.end = ([0.0] * schedule.n_ops for _ in range(3))
        self.finished = [False] * schedule.n_ops
        self.waiting: dict[int, list[int]] = {}
        """Streams whose next op waits for an op."""
        self.ready = list(range(len(self.queues)))
        """Streams that may be able to go on at this instant."""
        self.late: list[tuple[float, int]] = []
        """When ops end that have left their stream."""
        self.fluid: _Alone | _Fluid = _Fluid(schedule, self.occupancy, contention) if contention else _Alone()

    def _effective_deps(self) -> list[tuple[int, ...]]:
        """Dependencies with absent ops replaced by what they wait for."""
        here = [self.present[k] for k in self.classes]
        result: list[tuple[int, ...]] = []
        for deps in self.schedule.deps:
            for d in deps:
                if not here[d]:
                    break
            else:
                result.append(deps)
                continue
            found: set[int] = set()
            for d in deps:
                found.update((d,) if here[d] else result[d])
            result.append(tuple(sorted(found)))
        return result

    def timeline(self) -> Timeline:
        """Run to the end, and collect the times."""
        now, fluid, late, ready = 0.0, self.fluid, self.late, self.ready
        while True:
            for stream in ready:  # grows while it is gone through
                self._serve(stream, now)
            ready.clear()
            ends_at = fluid.ends_at(now)
            now = min(ends_at, late[0][0]) if late else ends_at
            if now == _NEVER:
                break
            while late and late[0][0] <= now:
                self._finish(heapq.heappop(late)[1], now)
            if ends_at <= now:
                for stream in fluid.ended(now):
                    self._leave(self.queues[stream][self.next[stream]], now)
                    self.next[stream] += 1
                    ready.append(stream)
        engine = "events, shared" if isinstance(fluid, _Fluid) else "events"
        return Timeline(self.schedule, *self._times(), engine=engine)

    def _serve(self, stream: int, now: float) -> None:
        """Begin the next ops of a stream until one holds it or has to wait."""
        queue, limit, finished = self.queues[stream], self.limit[stream], self.finished
        while self.next[stream] < len(queue):
            op = queue[self.next[stream]]
            for d in self.deps[op]:
                if not finished[d]:
                    self.waiting.setdefault(d, []).append(stream)
                    return
            if limit and self.next[stream] >= limit:
                before = queue[self.next[stream] - limit]
                if not finished[before]:
                    self.waiting.setdefault(before, []).append(stream)
                    return
            self.start[op] = now
            k = self.classes[op]
            if self.occupancy[k] > 0:
                self.fluid.begin(stream, k, self.occupancy[k], now)
                return
            self._leave(op, now)
            self.next[stream] += 1

    def _leave(self, op: int, now: float) -> None:
        """An op sets its stream free."""
        self.free[op] = now
        latency = self.latency[self.classes[op]]
        if latency > 0:
            heapq.heappush(self.late, (now + latency, op))
        else:
            self._finish(op, now)

    def _finish(self, op: int, now: float) -> None:
        self.end[op] = now
        self.finished[op] = True
        self.ready.extend(self.waiting.pop(op, ()))

    def _times(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        for op, k in enumerate(self.classes):
            if not self.present[k]:
                at = max((self.end[d] for d in self.deps[op]), default=0.0)
                self.start[op] = self.free[op] = self.end[op] = at
        return np.array(self.start), np.array(self.free), np.array(self.end)


class _Alone:
    """When the streams become free if nothing is shared."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, int]] = []

    def begin(self, stream: int, k: int, seconds: float, now: float) -> None:
        heapq.heappush(self.ends, (now + seconds, stream))

    def ends_at(self, now: float) -> float:
        return self.ends[0][0] if self.ends else _NEVER

    def ended(self, now: float) -> list[int]:
        found = []
        while self.ends and self.ends[0][0] <= now:
            found.append(heapq.heappop(self.ends)[1])
        return found


@dataclass(slots=True, eq=False)
class _Flow:
    work_s: float
    """Seconds left at full speed. [s]"""
    demand: int
    """Its demand class, which says what it draws and for whom."""
    stream: int
    speed: float = 1.0


class _Fluid:
    """The flows that are under way, and when the next of them ends."""

    def __init__(self, schedule: Schedule, occupancy: list[float], contention: Contention) -> None:
        self.rules = contention.interference
        self.flows: list[_Flow] = []
        self.at = 0.0
        self.changed = False
        """Flows began or ended at this instant, so that speeds are to settle before time moves on."""
        self.first_ends_at = _NEVER
        self.agent = [c.agent or c.link for c in schedule.classes]
        self.available = {r: contention.available(r) for r in contention.capacity_bytes_per_s}
        seconds = np.array(occupancy)
        draws = {resource: np.divide(amount[:, 0], seconds, out=np.zeros(len(seconds)), where=seconds > 0)
                 for resource, amount in schedule.bytes.items()}
        self.draws = [(resource, each.tolist()) for resource, each in draws.items()]
        # The largest share of any resource that a class asks for: while these add up to less than one, nobody waits.
        most = np.full(len(seconds), _NEVER if self.rules else 0.0)
        for resource in draws.keys() & self.available.keys():
            np.maximum(most, draws[resource] / self.available[resource], out=most)
        self.most: list[float] = most.tolist()
        self.known: dict[tuple[int, ...], list[float]] = {}
        """Speeds depend on nothing but which classes flow together, and the same ones keep meeting."""

    def begin(self, stream: int, k: int, seconds: float, now: float) -> None:
        self._advance(now)
        self.flows.append(_Flow(seconds, k, stream))
        self.changed = True

    def _advance(self, now: float) -> None:
        passed = now - self.at
        if passed:
            self.at = now
            for one in self.flows:
                one.work_s -= passed * one.speed

    def ends_at(self, now: float) -> float:
        """When the first flow ends; speeds settle once per instant, before time moves on. [s]"""
        if not self.changed:
            return self.first_ends_at
        self.changed = False
        flows = self.flows
        if not flows:
            self.first_ends_at = _NEVER
            return _NEVER
        speeds = self._speeds(tuple([f.demand for f in flows]))
        soonest = _NEVER
        for one, speed in zip(flows, speeds, strict=True):
            one.speed = speed
            ends_in = one.work_s / speed
            if ends_in < soonest:
                soonest = ends_in
        self.first_ends_at = now + max(soonest, 0.0)
        return self.first_ends_at

    def _speeds(self, together: tuple[int, ...]) -> list[float]:
        """Of the flows of some classes."""
        asked = 0.0
        for k in together:
            asked += self.most[k]
        if asked <= 1.0:
            return [1.0] * len(together)
        if together not in self.known:
            draws = [{resource: each[k] for resource, each in self.draws if each[k] > 0} for k in together]
            caps = interference_caps(draws, [self.agent[k] for k in together], self.rules)
            self.known[together] = fair_speeds(draws, self.available, caps)
        return self.known[together]

    def ended(self, now: float) -> list[int]:
        """Streams whose flow ends now."""
        self._advance(now)
        nothing = _FINISHED * now
        over = [f for f in self.flows if f.work_s <= nothing]
        if over:
            self.flows = [f for f in self.flows if f.work_s > nothing]
        else:
            over = [min(self.flows, key=lambda f: f.work_s / f.speed)]
            self.flows.remove(over[0])
        self.changed = True
        return [f.stream for f in over]


def interference_caps(draws: Sequence[Mapping[str, float]], agents: Sequence[str | None],
                      rules: Mapping[tuple[str, str, str], float]) -> list[float]:
    """The largest speed that measured interference leaves each of the flows that run together.

    Parameters
    ----------
    draws, agents : of each flow, what it draws of every resource [B/s], and who draws it.
    rules : (victim, other, resource) → share of its speed that the victim keeps.
    """
    caps = [1.0] * len(draws)
    if not rules:
        return caps
    for i, (mine, victim) in enumerate(zip(draws, agents, strict=True)):
        for j, (theirs, other) in enumerate(zip(draws, agents, strict=True)):
            if i != j and victim and other:
                for resource in mine.keys() & theirs.keys():
                    caps[i] = min(caps[i], rules.get((victim, other, resource), 1.0))
    return caps


def fair_speeds(draws: list[dict[str, float]], available: Mapping[str, float], caps: list[float]) -> list[float]:
    """Max-min fair speeds of flows that share resources.

    Parameters
    ----------
    draws : per flow, resource → what it draws at full speed. [B/s]
    available : resource → what there is; resources not named have room for everything. [B/s]
    caps : per flow, the largest speed it may have, in (0, 1].

    Returns
    -------
    Speeds in (0, 1], fair in bandwidth, so that a flow that asks for less than its share gets all of it. The
    bandwidth of a flow is its speed × the most it draws from any one resource. Progressive filling (Bertsekas &
    Gallager, Data Networks, §6.5.2): all bandwidths rise together, and a flow stops at its cap or where a resource
    it uses is full.
    """
    speeds, full = list(caps), 1 + _ROUNDING
    drawn: dict[str, float] = {}
    for draw, cap in zip(draws, caps, strict=True):
        for resource, amount in draw.items():
            drawn[resource] = drawn.get(resource, 0.0) + amount * cap
    for resource, amount in drawn.items():
        if resource in available and amount > available[resource] * full:
            break
    else:  # room for everything
        return speeds
    users: dict[str, list[int]] = {}
    for i, draw in enumerate(draws):
        for resource in draw:
            if resource in available:
                users.setdefault(resource, []).append(i)
    most = [max((d for r, d in draw.items() if r in available), default=0.0) for draw in draws]
    left = {r: available[r] for r in users}
    loose = {i for i, m in enumerate(most) if m > 0}
    level = 0.0
    while loose:
        reach = {}
        for resource, who in users.items():
            rise = sum(draws[i][resource] / most[i] for i in who if i in loose)
            if rise:
                reach[resource] = left[resource] / rise
        # The water never falls; rounding in what is left may say that it did.
        level = max(level, min(*reach.values(), *(most[i] * caps[i] for i in loose)))
        tight = {r for r, top in reach.items() if top <= level * full}
        for i in sorted(loose):
            capped = most[i] * caps[i] <= level * full
            if capped or not tight.isdisjoint(draws[i]):
                speeds[i] = caps[i] if capped else level / most[i]
                loose.discard(i)
                for resource, amount in draws[i].items():
                    if resource in left:
                        left[resource] = max(left[resource] - amount * speeds[i], 0.0)
    return speeds
