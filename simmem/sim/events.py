"""When does each op end if bandwidth is shared? One candidate through a simpy event simulation.

The same in-order streams as the analytic recurrence, plus what it cannot represent: bandwidth
shared max-min fairly between the ops on a resource, measured interference between agents, finite
queues and background load. Without sharing both engines agree to rounding.

Sharing is fluid. An op that alone takes t seconds and moves b bytes over a resource draws b/t
of it; its speed x ≤ 1 is the largest for which max-min fairness gives every flow its share, and
its progress is the integral of x. Speeds change only when an op starts or ends.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from simmem.errors import SpecError
from simmem.schedule import Durations, Schedule
from simmem.sim.timeline import Timeline

__all__ = ["Contention", "contends", "events", "fair_speeds"]

_FINISHED = 1e-15
"""A flow with less work left than this share of the time so far has ended: that much is rounding."""
_ROUNDING = 1e-12


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
    """State of one simulation."""

    def __init__(self, schedule: Schedule, durations: Durations, contention: Contention | None) -> None:
        self.env = simpy.Environment()
        self.schedule = schedule
        self.classes: list[int] = schedule.op_class.tolist()
        self.stream: list[int] = schedule.op_stream.tolist()
        self.occupancy: list[float] = durations.occupancy_s[:, 0].tolist()
        self.latency: list[float] = durations.latency_s[:, 0].tolist()
        present = schedule.present[:, 0].tolist()
        self.program = [o for o, k in enumerate(self.classes) if present[k]]
        self.deps = self._effective_deps(present)
        self.start = [0.0] * schedule.n_ops
        self.free = [0.0] * schedule.n_ops
        self.end = [0.0] * schedule.n_ops
        self.finished = [False] * schedule.n_ops
        self.waiting: dict[int, simpy.Event] = {}
        self.queue_limit = contention.queue_limit if contention else {}
        self.fluid = _Fluid(self.env, schedule, self.occupancy, contention) if contention else None

    def _effective_deps(self, present: list[bool]) -> list[tuple[int, ...]]:
        """Dependencies with absent ops replaced by what they wait for."""
        result: list[tuple[int, ...]] = []
        for deps in self.schedule.deps:
            if all(present[self.classes[d]] for d in deps):
                result.append(deps)
                continue
            found: set[int] = set()
            for d in deps:
                found.update((d,) if present[self.classes[d]] else result[d])
            result.append(tuple(sorted(found)))
        return result

    def serve(self, name: str, ops: list[int]) -> Generator[simpy.Event, Any, None]:
        env, finished, waiting = self.env, self.finished, self.waiting
        classes, occupancy, latency, deps, fluid = self.classes, self.occupancy, self.latency, self.deps, self.fluid
        limit = self.queue_limit.get(name)
        for position, op in enumerate(ops):
            for d in deps[op]:
                if not finished[d]:
                    yield waiting[d] if d in waiting else waiting.setdefault(d, env.event())
            if limit and position >= limit and not finished[ops[position - limit]]:
                yield waiting.setdefault(ops[position - limit], env.event())
            k = classes[op]
            self.start[op] = env.now
            if occupancy[k] > 0:
                yield fluid.flow(k) if fluid else env.timeout(occupancy[k])
            self.free[op] = env.now
            if latency[k] > 0:
                env.timeout(latency[k], value=op).callbacks.append(self._late)
            else:
                self._finish(op)

    def timeline(self) -> Timeline:
        """Start a process per stream, run to the end, and collect the times."""
        for index, name in enumerate(self.schedule.streams):
            ops = [o for o in self.program if self.stream[o] == index]
            if ops:
                self.env.process(self.serve(name, ops))
        self._to_the_end()
        return Timeline(self.schedule, *self._times(), engine="events, shared" if self.fluid else "events")

    def _to_the_end(self) -> None:
        """Run until nothing is left to happen; speeds settle once per instant, before time moves on."""
        env, fluid = self.env, self.fluid
        if fluid is None:
            env.run()
            return
        while env.peek() < float("inf"):
            env.step()
            if fluid.changed and env.peek() > env.now:
                fluid.settle()

    def _late(self, event: simpy.Event) -> None:
        op: int = event.value  # type: ignore[assignment]
        self._finish(op)

    def _finish(self, op: int) -> None:
        self.end[op] = self.env.now
        self.finished[op] = True
        event = self.waiting.pop(op, None)
        if event is not None:
            event.succeed()

    def _times(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        present = set(self.program)
        for op in range(self.schedule.n_ops):
            if op not in present:
                at = max((self.end[d] for d in self.deps[op]), default=0.0)
                self.start[op] = self.free[op] = self.end[op] = at
        return np.array(self.start), np.array(self.free), np.array(self.end)


@dataclass(slots=True, eq=False)
class _Flow:
    work_s: float
    """Seconds left at full speed. [s]"""
    demand: int
    """Its demand class, which says what it draws and for whom."""
    done: simpy.Event
    speed: float = 1.0


class _Fluid:
    """The flows that are under way, and when the next of them ends."""

    def __init__(self, env: simpy.Environment, schedule: Schedule, occupancy: list[float],
                 contention: Contention) -> None:
        self.env = env
        self.rules = contention.interference
        self.flows: list[_Flow] = []
        self.at = 0.0
        self.version = 0
        self.changed = False
        """Flows began or ended at this instant, so that speeds are to settle before time moves on."""
        self.occupancy = occupancy
        self.agent = [c.agent or c.link for c in schedule.classes]
        self.available = {r: contention.available(r) for r in contention.capacity_bytes_per_s}
        self.draw: list[dict[str, float]] = [{} for _ in occupancy]
        for resource, amount in schedule.bytes.items():
            for draw, n_bytes, seconds in zip(self.draw, amount[:, 0].tolist(), occupancy, strict=True):
                if n_bytes > 0 and seconds > 0:
                    draw[resource] = n_bytes / seconds
        self.known: dict[tuple[int, ...], list[float]] = {}
        """Speeds depend on nothing but which classes flow together, and the same ones keep meeting."""

    def flow(self, k: int) -> simpy.Event:
        self._advance()
        one = _Flow(self.occupancy[k], k, self.env.event())
        self.flows.append(one)
        self.changed = True
        return one.done

    def _advance(self) -> None:
        now = self.env.now
        passed = now - self.at
        if passed:
            self.at = now
            for one in self.flows:
                one.work_s -= passed * one.speed

    def settle(self) -> None:
        """Give every flow its speed, and wake when the first of them ends."""
        self.changed = False
        self.version += 1
        flows = self.flows
        if not flows:
            return
        together = tuple([f.demand for f in flows])
        speeds = self.known.get(together)
        if speeds is None:
            speeds = self.known[together] = fair_speeds([self.draw[k] for k in together], self.available,
                                                        self._caps(together))
        soonest = float("inf")
        for one, speed in zip(flows, speeds, strict=True):
            one.speed = speed
            ends_in = one.work_s / speed
            if ends_in < soonest:
                soonest = ends_in
        self.env.timeout(max(soonest, 0.0), self.version).callbacks.append(self._wake)

    def _wake(self, event: simpy.Event) -> None:
        if self.changed or event.value != self.version:
            return
        self._advance()
        nothing = _FINISHED * self.env.now
        ended = [f for f in self.flows if f.work_s <= nothing]
        if ended:
            self.flows = [f for f in self.flows if f.work_s > nothing]
        else:
            ended = [min(self.flows, key=lambda f: f.work_s / f.speed)]
            self.flows.remove(ended[0])
        for one in ended:
            one.done.succeed()
        self.changed = True

    def _caps(self, together: tuple[int, ...]) -> list[float]:
        """The largest speed that measured interference leaves each of the classes that flow together."""
        caps = [1.0] * len(together)
        if not self.rules:
            return caps
        for i, victim in enumerate(together):
            for j, other in enumerate(together):
                pair = self.agent[victim], self.agent[other]
                if i != j and pair[0] and pair[1]:
                    for resource in self.draw[victim].keys() & self.draw[other].keys():
                        caps[i] = min(caps[i], self.rules.get((pair[0], pair[1], resource), 1.0))
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
    speeds = list(caps)
    users: dict[str, list[int]] = {}
    for i, draw in enumerate(draws):
        for resource in draw:
            if resource in available:
                users.setdefault(resource, []).append(i)
    full = 1 + _ROUNDING
    if all(sum(draws[i][r] * caps[i] for i in who) <= available[r] * full for r, who in users.items()):
        return speeds
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
