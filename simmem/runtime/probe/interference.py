"""How much of its speed does one activity keep while another goes on?

A plan overlaps reads from storage with products and copies. Victim and aggressor are each measured alone and
together, in turn, so that what drifts touches both alike; `simmem.cost.interference` makes shares of them. Reads are
those of an executor: threads of this process that read past the page cache into buffers of their own.
Where the victim uses all cores, what it loses is time on them as much as bandwidth. A pair during which other programs
had the cores says nothing about either, and is refused.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np

from simmem.runtime.cores import run_anywhere
from simmem.runtime.probe.agents import torch_threads
from simmem.runtime.probe.base import ALWAYS, Case, Run, Setting
from simmem.runtime.probe.load import Load
from simmem.runtime.probe.matmul import ELEMENT_BYTES, Pool
from simmem.runtime.probe.shapes import Shape
from simmem.runtime.reader import page_buffer
from simmem.spec.measurement import Condition

__all__ = ["INTERFERENCE", "Background", "cases"]

INTERFERENCE = "interference"

READS = ((32768, 8), (1 << 20, 4))
"""Sizes and depths: bundles of a neuron, and streamed weights."""
_SAMPLE_S = 0.04
_COPY_BYTES = 64 << 20
_OTHERS_CORES = 0.2

Work = Callable[[], AbstractContextManager[Callable[[], object]]]
"""Makes what is called over and over."""


class _Others:
    """What other programs took of the cores while a case ran."""

    def __init__(self) -> None:
        self._core_s = self._wall_s = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        load, begin = Load(), time.monotonic()
        yield
        wall = time.monotonic() - begin
        self._wall_s += wall
        self._core_s += load.others().get("cores_used_by_others", 0.0) * wall

    def refuse(self, _median_s: float) -> str | None:
        cores = self._core_s / self._wall_s if self._wall_s else 0.0
        return f"other programs kept {cores:.1f} cores busy" if cores > _OTHERS_CORES else None


class Background:
    """Threads that do something over and over, and count how often, until the block ends."""

    def __init__(self, works: list[Work]) -> None:
        self._stop = threading.Event()
        self._counts = [0] * len(works)
        self._failure: OSError | RuntimeError | None = None
        self._threads = [threading.Thread(target=self._loop, args=(i, work), daemon=True)
                         for i, work in enumerate(works)]

    def __enter__(self) -> Background:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._check()

    @property
    def count(self) -> int:
        """How often all of them together have finished."""
        self._check()
        return sum(self._counts)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _loop(self, i: int, work: Work) -> None:
        run_anywhere()
        try:
            with work() as once:
                while not self._stop.is_set():
                    once()
                    self._counts[i] += 1
        except (OSError, RuntimeError) as error:  # for the thread that waits
            self._failure = error


def cases(setting: Setting) -> list[Case]:
    """Products beside reads and copies, and reads beside products.

    Those with all threads, in bf16, beside small reads are marked: a device's figures are derived from these alone, and
    a quick run measures no others.
    """
    pool = Pool(setting.cache_bytes, setting.memory_bytes, seed=setting.seed)
    shape = pool.square()
    if not pool.rotates(shape, "bf16") or setting.memory_bytes < 2 * (pool.weight_bytes + _COPY_BYTES):
        return []
    reads = [r for r in (READS[:1] if setting.quick else READS) if r[0] * r[1] <= setting.scratch_bytes / 4]
    if setting.scratch_fd is None or not setting.scratch_direct:
        reads = []
    every = sorted({1, setting.threads})
    found = []
    beside: list[tuple[dict[str, Condition], list[Work]]] = [({"aggressor": "none"}, []),
                                                             ({"aggressor": "memory-copy"}, [_copies])]
    beside += [({"aggressor": "storage-read", "aggressor_size_bytes": size, "aggressor_depth": depth},
                [_reads(setting, size)] * depth) for size, depth in reads]
    for dtype in ("bf16",) if setting.quick else ("bf16", "fp32"):
        found += [_product_victim(pool, shape, dtype, threads, *other) for threads in every for other in beside]
    for size, depth in reads:
        found.append(_read_victim(setting, size, depth, {"aggressor": "none"}, []))
        found += [_read_victim(setting, size, depth, {"aggressor": "gemv", "aggressor_threads": n,
                                                      "aggressor_dtype": "bf16"}, [_products(pool, shape, "bf16", n)])
                  for n in every]
    marked = [_marked(c) if _is_reference(c, setting.threads, reads) else c for c in found]
    return [c for c in marked if c.priority == ALWAYS] if setting.quick else marked


def _is_reference(case: Case, threads: int, reads: list[tuple[int, int]]) -> bool:
    said = case.conditions
    sizes = {said.get("size_bytes"), said.get("aggressor_size_bytes")} - {None}
    return (bool(reads) and said["aggressor"] != "memory-copy" and sizes <= {reads[0][0]}
            and said.get("dtype", "bf16") == "bf16" and {said.get("threads"), said.get("aggressor_threads")} <= {
                None, threads})


def _marked(case: Case) -> Case:
    mark: dict[str, Condition] = {} if case.conditions["aggressor"] == "none" else {"aggressor_reference": True}
    return replace(case, conditions={**case.conditions, **mark}, priority=ALWAYS)


def _product_victim(pool: Pool, shape: Shape, dtype: str, threads: int, aggressor: dict[str, Condition],
                    others: list[Work]) -> Case:
    beside = _Others()

    @contextmanager
    def prepared() -> Iterator[Run]:
        with _products(pool, shape, dtype, threads)() as step, Background(others), beside.counted():
            def run() -> float:
                begin, calls = time.perf_counter(), 0
                while (took := time.perf_counter() - begin) < _SAMPLE_S or calls == 0:
                    step()
                    calls += 1
                return took / calls

            yield run

    def setup() -> AbstractContextManager[Run]:
        return prepared()

    weights = float(shape.rows * shape.cols * ELEMENT_BYTES[dtype])
    return Case(INTERFERENCE, {"victim": "gemv", "agent": "cpu", "rows": shape.rows, "cols": shape.cols, "batch": 1,
                               "dtype": dtype, "threads": threads, **aggressor},
                setup, flop=2.0 * shape.rows * shape.cols, bytes=weights, requests=1.0, weight=3.0, priority=1,
                refuse=beside.refuse)


def _read_victim(setting: Setting, size: int, depth: int, aggressor: dict[str, Condition], others: list[Work]) -> Case:
    beside = _Others()

    @contextmanager
    def prepared() -> Iterator[Run]:
        with Background([_reads(setting, size)] * depth) as reading, Background(others), beside.counted():
            def run() -> float:
                begin, before = time.perf_counter(), reading.count
                while True:
                    time.sleep(_SAMPLE_S)
                    done = reading.count - before
                    if done >= depth:
                        return (time.perf_counter() - begin) / done

            yield run

    def setup() -> AbstractContextManager[Run]:
        return prepared()

    return Case(INTERFERENCE, {"victim": "storage-read", "size_bytes": size, "depth": depth, **aggressor}, setup,
                bytes=float(size), requests=1.0, weight=3.0, priority=1,
                refuse=beside.refuse)


def _products(pool: Pool, shape: Shape, dtype: str, threads: int) -> Work:
    import torch

    @contextmanager
    def prepared() -> Iterator[Callable[[], object]]:
        with torch_threads(threads):
            x = pool.activations(1, shape.cols, dtype)
            out = torch.zeros(1, shape.rows, dtype=x.dtype)
            weights = pool.weights(shape, dtype)
            yield lambda: torch.mm(x, weights.next(), out=out)

    return prepared


@contextmanager
def _copies() -> Iterator[Callable[[], object]]:
    source, target = np.ones(_COPY_BYTES, np.uint8), np.zeros(_COPY_BYTES, np.uint8)
    yield lambda: np.copyto(target, source)


def _reads(setting: Setting, size: int) -> Work:
    fd, slots = setting.scratch_fd, setting.scratch_bytes // size

    @contextmanager
    def prepared() -> Iterator[Callable[[], object]]:
        assert fd is not None  # asked for only where there is one
        random = np.random.default_rng()
        view = page_buffer(size).data
        offsets = (random.integers(0, slots, 1 << 12) * size).tolist()
        at = 0

        def once() -> None:
            nonlocal at
            os.preadv(fd, [view], offsets[at])
            at = (at + 1) % len(offsets)

        yield once

    return prepared
