"""What happened when? Intervals of one candidate, and what its critical path was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.schedule import OpKind, Schedule

__all__ = ["BREAKDOWN", "Timeline", "critical_path", "occupancy"]

Array = NDArray[np.float64]

BREAKDOWN = (*(k.value for k in OpKind), "wait")


@dataclass(frozen=True)
class Timeline:
    """Times of every op of one candidate, each array (n_ops,). [s]

    `start_s` to `free_s` it held its stream; at `end_s` its dependants may start. An op without
    demand has start = free = end. Measured runs emit the same type.
    """

    schedule: Schedule
    start_s: Array
    free_s: Array
    end_s: Array
    engine: str

    @property
    def makespan_s(self) -> float:
        return float(self.end_s.max(initial=0.0))

    @property
    def token_end_s(self) -> Array:
        """End of each token, (n_tokens,); of everything where no op ends a token. [s]"""
        ends = self.schedule.token_ends
        return self.end_s[list(ends)] if ends else np.array([self.makespan_s])

    @property
    def token_s(self) -> float:
        """Seconds of the timed (last) token. [s]"""
        ends = self.token_end_s
        return float(ends[-1] - (ends[-2] if len(ends) > 1 else 0.0))

    @property
    def busy_s(self) -> dict[str, float]:
        """Seconds each stream was held by ops of the timed token. [s]"""
        s = self.schedule
        held = (self.free_s - self.start_s) * s.timed
        return {name: float(held[s.op_stream == i].sum()) for i, name in enumerate(s.streams)}


def critical_path(timeline: Timeline) -> dict[str, float]:
    """Seconds of the timed token by kind of op along its critical path, summing to its latency.

    Walks back from the token's last op to whichever predecessor (a dependency, or the op before
    it on its stream) let it start; time that no op explains is `wait`.
    """
    s = timeline.schedule
    here = s.present[s.op_class, 0]
    last = np.full(s.n_ops, -1)
    for stream in range(len(s.streams)):
        queue = np.flatnonzero(here & (s.op_stream == stream))
        last[queue[1:]] = queue[:-1]
    present: list[bool] = here.tolist()
    before: list[int] = last.tolist()
    total = dict.fromkeys(BREAKDOWN, 0.0)
    begin = float(timeline.token_end_s[-2]) if len(s.token_ends) > 1 else 0.0
    op: int | None = s.token_ends[-1] if s.token_ends else int(np.argmax(timeline.end_s))
    at = float(timeline.token_end_s[-1])
    start, free, end = (times.tolist() for times in (timeline.start_s, timeline.free_s, timeline.end_s))
    while op is not None and at > begin:
        opened = max(start[op], begin)
        if present[op] and at > opened:
            total[s.classes[int(s.op_class[op])].kind.value] += at - opened
            at = opened
        if at <= begin:
            break
        options = [(end[d], d) for d in s.deps[op]]
        previous = before[op]
        if present[op] and previous >= 0:
            options.append((free[previous], previous))
        if not options:
            break
        reached, op = max(options)
        if reached < at:
            total["wait"] += at - max(reached, begin)
            at = max(reached, begin)
    if at > begin:
        total["wait"] += at - begin
    return total


def occupancy(timeline: Timeline) -> Mapping[str, tuple[Array, Array]]:
    """Bytes held in each tier over time: tier → (time_s, held_bytes), one step per change."""
    s = timeline.schedule
    result: dict[str, tuple[Array, Array]] = {}
    for tier in sorted({*s.held_bytes, *s.acquire_bytes, *s.release_bytes}):
        base = float(s.held_bytes[tier][0]) if tier in s.held_bytes else 0.0
        events: list[tuple[float, int, float]] = []
        for table, times, sign in ((s.acquire_bytes, timeline.start_s, 1), (s.release_bytes, timeline.end_s, -1)):
            if tier in table:
                amounts = table[tier][s.op_class, 0]
                events += [(float(times[o]), sign, sign * float(amounts[o])) for o in np.flatnonzero(amounts)]
        events.sort()  # at one instant, releases (sign -1) come before acquisitions
        times_s = np.array([0.0, *(e[0] for e in events)])
        held = base + np.concatenate([[0.0], np.cumsum([e[2] for e in events])])
        result[tier] = (times_s, held)
    return result
