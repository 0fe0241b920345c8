"""How are LFU and SLRU replayed when a step uses a handful of units, as with a model's experts?

Sets of words pay when many units move at once. Here they are taken one by one from queues in plain Python, a cache
after the other; the policies are those of `simmem.trace.caches`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush, heapreplace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simmem.trace.caches import PROTECTED_TENTHS, Scope

__all__ = ["misses_by_part"]

Ints = NDArray[np.int64]
_CHUNK_TOKENS = 1024


def misses_by_part(active: NDArray[np.uint8], n_units: int, policy: Literal["lfu", "slru"], capacities: Ints,
                   scope: Scope, cold_tokens: int) -> Ints:
    """(2, N) misses in the cold and in the steady part. `active`: packed bits (T, L, n_bytes)."""
    n_layers = active.shape[1]
    caches = [active] if scope == "global" else [active[:, layer : layer + 1] for layer in range(n_layers)]
    replay = _lfu if policy == "lfu" else _slru
    found = np.zeros((2, capacities.size), np.int64)
    for part in caches:
        steps = _Steps(part, n_units, cold_tokens)
        for i, capacity in enumerate(capacities.tolist()):
            found[:, i] += replay(steps, capacity)
    return found


class _Steps:
    """What one cache sees: (whether it is steady state, ids of the units used, ascending), step by step."""

    def __init__(self, active: NDArray[np.uint8], n_units: int, cold_tokens: int) -> None:
        n_tokens, n_layers = active.shape[:2]
        self.n_units = n_layers * n_units
        self._ids: list[int] = []
        self._ends = np.cumsum(np.bitwise_count(active).sum(axis=2, dtype=np.int64)).tolist()
        for start in range(0, n_tokens, _CHUNK_TOKENS):
            bits = np.unpackbits(active[start : start + _CHUNK_TOKENS], axis=2, count=n_units, bitorder="little")
            self._ids += (np.flatnonzero(bits) % self.n_units).tolist()
        self._cold_steps = cold_tokens * n_layers

    def __iter__(self) -> Iterator[tuple[bool, list[int]]]:
        start = 0
        for step, end in enumerate(self._ends):
            if end > start:  # a slice made anew each time: a million kept lists would keep the collector busy
                yield step >= self._cold_steps, self._ids[start:end]
                start = end


def _lfu(steps: _Steps, capacity: int) -> tuple[int, int]:
    """One heap of uses * n + id: the lowest goes first, ties by id. An entry whose unit was used since it was made is
    put back with what it has now when it comes up."""
    n = steps.n_units
    now, queue, held = list(range(n)), list[int](), set[int]()
    misses = [0, 0]
    for steady, ids in steps:
        missed = [unit for unit in ids if unit not in held]
        for unit in ids:
            now[unit] += n
        if not missed:
            continue
        misses[steady] += len(missed)
        room = capacity - len(ids) + len(missed)
        if len(missed) > room:
            missed = missed[: max(room, 0)]
        due = len(held) + len(missed) - capacity
        pinned = []
        while due > 0:
            entry = queue[0]
            unit = entry % n
            if now[unit] != entry:
                heapreplace(queue, now[unit])
                continue
            heappop(queue)
            if unit in ids:
                pinned.append(entry)
            else:
                held.remove(unit)
                due -= 1
        for unit in missed:
            heappush(queue, now[unit])
        for entry in pinned:
            heappush(queue, entry)
        held.update(missed)
    return misses[0], misses[1]


def _slru(steps: _Steps, capacity: int) -> tuple[int, int]:
    """Two queues in order of entry, and by id within a step."""
    limit = capacity * PROTECTED_TENTHS // 10
    probation, protected = OrderedDict[int, None](), OrderedDict[int, None]()
    misses = [0, 0]
    for steady, ids in steps:
        missed = []
        for unit in ids:
            if unit in protected:
                protected.move_to_end(unit)
            elif unit in probation:
                del probation[unit]
                protected[unit] = None
            else:
                missed.append(unit)
        entering = []
        if len(protected) > limit:
            entering = sorted(protected.popitem(last=False)[0] for _ in range(len(protected) - limit))
        if missed:
            misses[steady] += len(missed)
            room = capacity - len(ids) + len(missed)
            if len(missed) > room:
                missed = missed[: max(room, 0)]
            due = len(probation) + len(protected) + len(entering) + len(missed) - capacity
            while due > 0 and probation:  # what the step used is in the other queue, or entering
                probation.popitem(last=False)
                due -= 1
            if due > 0:
                loose = [unit for unit in entering if unit not in ids][:due]
                entering = [unit for unit in entering if unit not in loose]
                for _ in range(due - len(loose)):
                    protected.popitem(last=False)  # what the step used is at the other end
            entering = sorted(entering + missed) if entering else missed
        for unit in entering:
            probation[unit] = None
    return misses[0], misses[1]
