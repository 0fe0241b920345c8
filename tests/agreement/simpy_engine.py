"""The event engine as processes of simpy: three times slower, and what `simmem.sim.events` is held to."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from simmem.schedule import Durations, Schedule
from simmem.sim.events import Contention, fair_speeds, interference_caps
from simmem.sim.timeline import Timeline

__all__ = ["simulate"]

_FINISHED = 1e-15
"""A flow with less work left than this share of the time so far has ended: that much is rounding."""


def simulate(schedule: Schedule, durations: Durations, contention: Contention | None) -> Timeline:
    """One candidate; every resource is dedicated where `contention` is None."""
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
            draws = [self.draw[k] for k in together]
            caps = interference_caps(draws, [self.agent[k] for k in together], self.rules)
            speeds = self.known[together] = fair_speeds(draws, self.available, caps)
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
