"""When does each op end if nothing is shared? The max-plus recurrence, all candidates at once.

Equal to the event engine on dedicated resources, a lower bound where resources are shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.schedule import Durations, Schedule
from simmem.sim.timeline import Timeline

__all__ = ["AnalyticResult", "analytic", "dedicated"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class AnalyticResult:
    """makespan_s and token_s are (n_candidates,); token_end_s is (n_tokens, n_candidates)."""

    token_end_s: Array
    makespan_s: Array

    @property
    def token_s(self) -> Array:
        """Seconds of the timed (last) token: from the end of the one before. [s]"""
        if len(self.token_end_s) > 1:
            return np.asarray(self.token_end_s[-1] - self.token_end_s[-2])
        return np.asarray(self.token_end_s[-1])


def analytic(schedule: Schedule, durations: Durations) -> AnalyticResult:
    """Run the recurrence of `simmem.schedule` over all ops, vectorised over candidates."""
    n = schedule.n_candidates
    occupancy, latency = durations.occupancy_s, durations.latency_s
    present = schedule.present
    in_candidates = present.sum(axis=1)
    everywhere = (in_candidates == n).tolist()
    nowhere = (in_candidates == 0).tolist()
    waits = (latency != 0).any(axis=1).tolist()
    last_use = list(range(schedule.n_ops))
    for op, deps in enumerate(schedule.deps):
        for d in deps:
            last_use[d] = op
    marks = set(schedule.token_ends)
    zero = np.zeros(n)
    free: list[Array] = [zero for _ in schedule.streams]
    ends: list[Array | None] = [None] * schedule.n_ops
    makespan = np.zeros(n)
    classes, streams = schedule.op_class.tolist(), schedule.op_stream.tolist()
    token_end: dict[int, Array] = {}
    for op, deps in enumerate(schedule.deps):
        ready = zero
        for d in deps:
            end = ends[d]
            assert end is not None
            ready = end if ready is zero else np.maximum(ready, end)
            if last_use[d] == op and d not in marks:
                ends[d] = None
        k, stream = classes[op], streams[op]
        if nowhere[k]:
            end = ready
        else:
            busy_until = np.maximum(ready, free[stream])
            busy_until += occupancy[k]
            done = busy_until + latency[k] if waits[k] else busy_until
            if everywhere[k]:
                free[stream], end = busy_until, done
            else:
                here = present[k]
                free[stream] = np.where(here, busy_until, free[stream])
                end = np.where(here, done, ready)
        if last_use[op] == op:  # what others wait for ends before they do
            np.maximum(makespan, end, out=makespan)
        if last_use[op] > op or op in marks:
            ends[op] = end
        if op in marks:
            token_end[op] = end
    ends_of_tokens = np.array([token_end[o] for o in schedule.token_ends]) if schedule.token_ends else makespan[None]
    return AnalyticResult(ends_of_tokens, makespan)


def dedicated(schedule: Schedule, durations: Durations) -> list[Timeline]:
    """The whole timeline of each candidate: `analytic` keeps only when tokens end, this every op of them."""
    shape = schedule.n_ops, schedule.n_candidates
    start, free, end = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    stream_free = np.zeros((len(schedule.streams), schedule.n_candidates))
    present = schedule.present
    everywhere: list[bool] = np.all(present, axis=1).tolist()
    nowhere: list[bool] = np.all(~present, axis=1).tolist()
    classes, streams = schedule.op_class.tolist(), schedule.op_stream.tolist()
    for op, deps in enumerate(schedule.deps):
        k, stream = classes[op], stream_free[streams[op]]
        ready = start[op]  # zero until here
        for d in deps:
            np.maximum(ready, end[d], out=ready)
        if nowhere[k]:
            free[op] = end[op] = ready
            continue
        np.maximum(ready, stream if everywhere[k] else np.where(present[k], stream, 0.0), out=ready)
        np.add(ready, durations.occupancy_s[k], out=free[op])
        np.add(free[op], durations.latency_s[k], out=end[op])
        np.copyto(stream, free[op], where=present[k])
    begins, frees, ends = (np.ascontiguousarray(times.T) for times in (start, free, end))
    return [Timeline(schedule.column(i), begins[i], frees[i], ends[i], "analytic")
            for i in range(schedule.n_candidates)]
