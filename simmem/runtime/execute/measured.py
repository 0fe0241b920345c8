"""When did each op begin and end, as the simulator would say it?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from simmem.schedule import Schedule
from simmem.sim.timeline import Timeline

if TYPE_CHECKING:
    import torch

__all__ = ["Clock", "Key", "beside_name", "demands_of", "nth_name", "timeline_of"]

Key = tuple[int, str, int]
"""(token of the run, class, layer): each class has one op a token and layer; see `beside_name` and `nth_name`."""


def beside_name(name: str) -> str:
    """What a class of ops is called where it is the second unit's."""
    return f"{name}, beside"


def nth_name(name: str, nth: int) -> str:
    """What the ops of a token and layer are called whose classes share a name, in program order from 0."""
    return f"{name} {nth + 1}" if nth else name


@dataclass
class Clock:
    """Takes the times of ops: of the processor's on its own clock, of a GPU's through its events."""

    device: torch.device
    times: dict[Key, tuple[float, float]] = field(default_factory=dict)
    """(began, ended) by `time.perf_counter`. [s]"""
    _events: dict[Key, tuple[Any, Any]] = field(default_factory=dict)
    _base: tuple[float, Any] | None = None

    def begin(self) -> None:
        """Forget everything; from here on a GPU's times can be told."""
        self.times.clear()
        self._events.clear()
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
            base = torch.cuda.Event(enable_timing=True)
            base.record()
            torch.cuda.synchronize(self.device)
            self._base = time.perf_counter(), base

    @contextmanager
    def op(self, key: Key) -> Iterator[None]:
        """Time what the block launches on the device's current stream."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            yield
            self.times[key] = (began, time.perf_counter())
            return
        import torch

        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events[key] = (first, last)

    @contextmanager
    def step(self, token: int, layer: int) -> Iterator[None]:
        """Time what the processor does once a token, such as taking the token that was chosen."""
        began = time.perf_counter()
        yield
        self.times[token, "step", layer] = (began, time.perf_counter())

    @contextmanager
    def pause(self, token: int) -> Iterator[None]:
        """What the block takes, behind a token, is no token's time."""
        began = time.perf_counter()
        yield
        self.times[token, "pause", 0] = (began, time.perf_counter())

    def note(self, key: Key, events: tuple[Any, Any]) -> None:
        """Take the times of an op from a GPU's events."""
        self._events[key] = events

    def wait(self, key: Key | None) -> None:
        """Return when the op is done; on the CPU it is already."""
        if key in self._events:
            self._events[key][1].synchronize()

    def settle(self) -> None:
        """Turn events into times, once all work is done."""
        if self._base is None:
            return
        import torch

        torch.cuda.synchronize(self.device)
        zero_s, base = self._base
        for key, (first, last) in self._events.items():
            self.times[key] = (zero_s + base.elapsed_time(first) / 1e3, zero_s + base.elapsed_time(last) / 1e3)
        self._events.clear()


def timeline_of(column: Schedule, times: Mapping[Key, tuple[float, float]], token: int, engine: str, *,
                beside: str | None = None) -> Timeline:
    """A token's schedule with the times its ops took here; times begin where the token before the schedule's ended.

    The schedule's tokens are mapped to the run's so that its timed one is `token`. An op that was not run (it has no
    demand, or belongs to a token that was not) takes no time and ends with its dependencies.

    beside : the agent whose classes go by their `beside_name`.
    """
    n = column.n_ops
    timed = int(column.op_token[column.token_ends[-1]])
    start, free = np.zeros(n), np.zeros(n)
    stream_free: dict[int, float] = {}
    shift = token - timed
    known = [times.get((number + shift, name, layer)) for number, name, layer in _keys(column, beside)]
    zero = _end_of(times, shift - 1)
    if zero is None:
        zero = min((t[0] for t in known if t is not None), default=0.0)
    for op, found in enumerate(known):
        stream = int(column.op_stream[op])
        if found is None:
            start[op] = free[op] = max((free[d] for d in column.deps[op]), default=0.0)
            continue
        # What was handed in early may begin before its stream's last op has ended; it then holds it from there on, and
        # for no time where it even ended before.
        earliest = stream_free.get(stream, 0.0)
        free[op] = max(found[1] - zero, 0.0)
        start[op] = min(max(found[0] - zero, earliest), free[op])
        stream_free[stream] = max(free[op], earliest)
    return Timeline(column, start, free, free.copy(), engine)


def _keys(column: Schedule, beside: str | None) -> Iterator[Key]:
    """Each op's token of the schedule, name and layer."""
    seen: Counter[Key] = Counter()
    for op in range(column.n_ops):
        what = column.classes[int(column.op_class[op])]
        name = what.name if beside is None or what.agent != beside else beside_name(what.name)
        key = int(column.op_token[op]), name, int(column.op_layer[op])
        yield key[0], nth_name(name, seen[key]), key[2]
        seen[key] += 1


def _end_of(times: Mapping[Key, tuple[float, float]], token: int) -> float | None:
    """When a token of the run ended: a pause behind it, its last step, or else its output projection."""
    ends = [span[1] for (number, name, _), span in times.items()
            if number == token and name in ("pause", "step", "head")]
    return max(ends, default=None)


def demands_of(column: Schedule, name: str) -> dict[int, int]:
    """Layer → demand class of the timed token's ops whose class has this name and demands something."""
    return {int(column.op_layer[op]): int(column.op_class[op]) for op in np.flatnonzero(column.timed)
            if column.classes[int(column.op_class[op])].name == name
            and column.present[int(column.op_class[op]), 0]}
