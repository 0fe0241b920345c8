"""How fast do this machine's cores read and copy memory, out of DRAM and out of their caches?

Reading is torch's sum of fp32 numbers, copying its `copy_`; both go through at least four last-level caches before they
come back to the same place, or stay within a quarter of one, which is a point of its own (`level` cache). A byte counts
once for each side: a copy of n bytes moves 2 n, and what a cache reads before it writes is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from simmem.runtime.probe.agents import torch_threads
from simmem.runtime.probe.base import ALWAYS, Case, Run, Setting
from simmem.runtime.probe.watched import watched
from simmem.spec.measurement import Condition

__all__ = ["COPY", "READ", "SUSTAINED", "cases", "sustained_cases"]

READ, COPY, SUSTAINED = "memory-read", "memory-copy", "memory-sustained"

_CACHES = 4
_CACHED_SHARE = 0.25
_BLOCK_BYTES = 8 << 20
_SUSTAINED_S = 0.5


class _Stream:
    """Two arrays of several caches, made when first asked for."""

    def __init__(self, setting: Setting) -> None:
        most = int(setting.memory_bytes * 0.4) // _BLOCK_BYTES * _BLOCK_BYTES
        self.size_bytes = max(min(-(-_CACHES * setting.cache_bytes // _BLOCK_BYTES) * _BLOCK_BYTES, most), _BLOCK_BYTES)
        self.rotates = self.size_bytes >= _CACHES * setting.cache_bytes
        self._arrays: tuple[Any, Any] | None = None

    def arrays(self) -> tuple[Any, Any]:
        import torch

        if self._arrays is None:
            self._arrays = (torch.rand(self.size_bytes // 4), torch.zeros(self.size_bytes // 4))
        return self._arrays


def cases(setting: Setting) -> list[Case]:
    """Reads and copies with one thread up to all, from memory; and from the cache."""
    stream = _Stream(setting)
    threads = sorted({1, 2, 4, 8, 16, 32, 64, 128, setting.threads})
    some = [n for n in threads if n <= setting.threads]
    cached = int(setting.cache_bytes * _CACHED_SHARE)
    found = [_case(READ, stream, "cache", n, cached) for n in sorted({1, setting.threads})]
    if stream.rotates:
        found += [_case(probe, stream, "dram", n, stream.size_bytes) for probe in (READ, COPY) for n in some]
    return found


def sustained_cases(setting: Setting) -> list[Case]:
    """Reads with all threads, in samples of half a second, for as long as they are let."""
    stream = _Stream(setting)
    return [_case(SUSTAINED, stream, "dram", setting.threads, stream.size_bytes)] if stream.rotates else []


@contextmanager
def _stretches(threads: int, prepare: Callable[[], Callable[[], object]]) -> Iterator[Run]:
    """Seconds of a call, over half a second of them."""
    with torch_threads(threads):
        step = prepare()

        def run() -> float:
            begin, calls = time.perf_counter(), 0
            while (took := time.perf_counter() - begin) < _SUSTAINED_S or not calls:
                step()
                calls += 1
            return took / calls

        yield run


def _case(probe: str, stream: _Stream, level: str, threads: int, size_bytes: int) -> Case:
    copies = probe == COPY
    length = min(size_bytes, stream.size_bytes) // 4
    conditions: dict[str, Condition] = {"agent": "cpu", "level": level, "threads": threads, "size_bytes": 4 * length}

    def prepare() -> Callable[[], object]:
        source, target = (array[:length] for array in stream.arrays())
        return (lambda: target.copy_(source)) if copies else source.sum

    setup: Callable[[], AbstractContextManager[Run]]
    refuse: Callable[[float], str | None] | None
    setup, refuse = watched(threads, prepare)
    if probe == SUSTAINED:
        # No half second passes without some other thread's turn: what that costs is in what lasts, and in its noise.
        setup, refuse = (lambda: _stretches(threads, prepare)), None
    return Case(probe, conditions, setup, bytes=4.0 * length * (2 if copies else 1), requests=1.0,
                priority=ALWAYS, refuse=refuse)
