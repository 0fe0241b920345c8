"""How fast does storage answer, by request size, how many are in flight, pattern, and past or through the page cache?

Threads keep `depth` reads in flight, each taking the next offset from one list. A sample is a stretch of that steady
stream: the time per request between two completions. So a request is counted whole, with nothing starting or ending.

Every request also costs the time in which Python and the system issue it. The probe "read-call" measures it with reads
of no bytes; `guard` refuses what would measure it rather than the drive.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simmem.runtime.cores import run_anywhere
from simmem.runtime.probe.base import ALWAYS, Case, NotHereError, Run
from simmem.runtime.probe.machine import cache_bytes
from simmem.runtime.probe.scratch import BLOCK_BYTES, Scratch
from simmem.runtime.reader import HUGE_PAGE_BYTES, Reader, page_buffer, reads
from simmem.spec.measurement import Condition, Measurement

__all__ = ["BATCH", "CALL", "READ", "SUSTAINED", "batch_cases", "cases", "guard", "other_work", "read_seconds",
           "sustained_cases"]

READ, CALL, SUSTAINED, BATCH = "storage-read", "read-call", "storage-sustained", "batch-read"

SIZES = tuple(4096 << 2 * k for k in range(7))
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
_QUICK_SIZES = SIZES[::2]
_QUICK_DEPTHS = (1, 4, 32)
_BUFFERS_BYTES = 256 << 20
"""What all reads in flight may take together; larger products of size and depth are left out."""
_CACHED_BYTES = 64 << 20
_SAMPLE_S = 0.03
_BATCH_SIZES, _BATCHES = (8192, 1 << 16, 1 << 20), (2, 8, 32, 256)
_BEHIND_CACHES, _COLS = 2, 4096
"""The product before a batch reads so many times what the last cache holds, in rows of so many weights."""
_READERS = 32
"""At most, for a batch; readers of a smaller one are as many as its reads."""
_SUSTAINED_SAMPLE_S = 0.5
_LEAST_REQUESTS = 16
_LIST = 1 << 16

_HIT = 2.0
"""Reads of what no cache should hold, faster than direct ones by more than this, came from a cache."""
_HELD = 0.05
_OUR_SHARE = 0.5
"""Where issuing takes more than this share of a request's time, the drive is not what is measured."""


def cases(scratch: Scratch, *, quick: bool) -> list[Case]:
    """Reads of the scratch file over size × depth × pattern × direct, buffered and cached; and empty reads."""
    found = []
    sizes, depths = (_QUICK_SIZES, _QUICK_DEPTHS) if quick else (SIZES, DEPTHS)
    ways: list[tuple[str, str, Sequence[int], int]] = []
    if scratch.direct_fd is not None:
        ways = [("direct", "random", depths, 0), ("direct", "sequential", (1, 4) if quick else (1, 2, 4, 8, 32), 1)]
    if not scratch.volume.in_memory:
        ways += [("buffered", "random", (4,) if quick else (1, 4, 16, 64), 2),
                 ("buffered", "sequential", (1,) if quick else (1, 4), 2)]
    ways.append(("cached", "random", (1, 4) if quick else (1, 2, 4, 8), 2))
    for how, pattern, some, priority in ways:
        always = _QUICK_DEPTHS if how != "buffered" or scratch.direct_fd is None else ()
        found += [_case(READ, scratch, how, pattern, size, depth,
                        priority=ALWAYS if size in _QUICK_SIZES and depth in always else priority)
                  for size in (sizes[1:] if quick and how != "direct" else sizes) for depth in some
                  if size * depth <= min(_BUFFERS_BYTES, scratch.size_bytes // 2)]
    return found + [Case(CALL, {"depth": depth}, _setup(scratch, "direct", "random", 0, depth, _SAMPLE_S),
                         requests=1.0, weight=0.5, priority=ALWAYS) for depth in depths]


def batch_cases(scratch: Scratch) -> list[Case]:
    """Batches of reads behind a product, as a layer hands them in, by the reader that runs plans."""
    if scratch.direct_fd is None:
        return []
    return [Case(BATCH, {"size_bytes": size, "requests": n, "depth": min(n, _READERS),
                         "behind_bytes": _BEHIND_CACHES * cache_bytes(), "how": "direct"},
                 _batch(scratch, size, n), bytes=float(size * n), requests=float(n), priority=ALWAYS)
            for size in _BATCH_SIZES for n in _BATCHES if size * n <= min(_BUFFERS_BYTES, scratch.size_bytes // 2)]


def _batch(scratch: Scratch, size: int, n: int) -> Callable[[], AbstractContextManager[Run]]:
    @contextmanager
    def setup() -> Iterator[Run]:
        assert scratch.direct_fd is not None
        random, buffer = np.random.default_rng(), page_buffer(size * n)
        sizes, compute = np.full(n, size, np.int64), other_work()
        with Reader(scratch.direct_fd, "the scratch file", min(n, _READERS)) as reader:
            def run() -> float:
                offsets = random.integers(0, scratch.size_bytes // size, n) * size
                compute()
                begun = time.perf_counter()
                reader.submit(reads(offsets, sizes, buffer)).wait()
                return time.perf_counter() - begun

            yield run

    return setup


@lru_cache(maxsize=1)
def other_work() -> Callable[[], None]:
    """What comes before a batch of reads: a product of one token with twice the weights that the last cache holds.

    A batch of reads finds caches and threads as a layer leaves them: 32 reads of 8 KiB took 1.8 and 1.5 ms behind a
    pause of 3 ms, and 2.1 behind products over 67 MB.
    """
    import torch

    weights = torch.ones(max(_BEHIND_CACHES * cache_bytes() // (4 * _COLS), 1), _COLS)
    token = torch.ones(1, _COLS)

    def compute() -> None:
        with torch.inference_mode():
            torch.mm(token, weights.t())

    return compute


def sustained_cases(scratch: Scratch) -> list[Case]:
    """The largest direct reads, one after the other, for as long as they are let."""
    if scratch.direct_fd is None:
        return []
    return [_case(SUSTAINED, scratch, "direct", "sequential", 4 << 20, 4, sample_s=_SUSTAINED_SAMPLE_S)]


def read_seconds(scratch: Scratch, size: int, depth: int, *, samples: int = 5, pattern: str = "random") -> list[float]:
    """Seconds per direct read in a steady stream of them, one for each sample of some 30 ms. [s]

    size : of a read, whole blocks; no more than half of the file. [B]

    Raises OSError where reading fails.
    """
    with _stream(scratch, "direct", pattern, size, depth, _SAMPLE_S) as run:
        run()  # until the stream is steady
        return [seconds for _ in range(samples) if (seconds := run()) is not None]


def _case(probe: str, scratch: Scratch, how: str, pattern: str, size: int, depth: int, *, priority: int = 1,
          sample_s: float = _SAMPLE_S) -> Case:
    conditions: dict[str, Condition] = {"size_bytes": size, "depth": depth, "pattern": pattern, "how": how}
    link = scratch.volume.link_bytes_per_s

    def refuse(seconds: float) -> str | None:
        if how != "cached" and link is not None and size / seconds > link:
            return "a cache hit: faster than the link of the drive"
        return None

    return Case(probe, conditions, _setup(scratch, how, pattern, size, depth, sample_s), bytes=float(size),
                requests=1.0, priority=priority, refuse=refuse)


def _setup(scratch: Scratch, how: str, pattern: str, size: int, depth: int, sample_s: float
           ) -> Callable[[], AbstractContextManager[Run]]:
    return lambda: _stream(scratch, how, pattern, size, depth, sample_s)


@contextmanager
def _stream(scratch: Scratch, how: str, pattern: str, size: int, depth: int, sample_s: float) -> Iterator[Run]:
    """Threads that read without pause; the run waits for a stretch of completions and times it."""
    fd = scratch.fd if how != "direct" or scratch.direct_fd is None else scratch.direct_fd
    extent = min(_CACHED_BYTES, scratch.size_bytes) if how == "cached" else scratch.size_bytes
    if how == "buffered":
        if not hasattr(os, "posix_fadvise"):
            raise NotHereError("this system cannot be asked to empty its page cache")
        scratch.forget()
        if (held := scratch.held_share()) > _HELD:
            raise NotHereError(f"the page cache keeps {100 * held:.0f} % of the file though asked to drop it")
    if how == "cached":
        with mmap.mmap(-1, 1 << 20) as page:
            for start in range(0, extent, 1 << 20):
                os.preadv(fd, [page], start)
    slots = max(extent // max(size, BLOCK_BYTES), 1)
    random = np.random.default_rng()
    # Buffered reads touch each place once: what was read a moment ago would come out of the page cache.
    once = how == "buffered"
    if pattern == "random":
        places = random.permutation(slots) if once or slots <= _LIST else random.integers(0, slots, _LIST)
    else:
        first = 0 if once else int(random.integers(slots))
        places = (first + np.arange(slots if once else max(slots, 1))) % slots
    offsets = (places * max(size, BLOCK_BYTES)).tolist()
    position = iter(offsets)
    finished: list[float] = []
    failures: list[OSError] = []
    stop = threading.Event()

    # Side by side and in huge pages, as whoever runs a plan reads.
    step = max(size, BLOCK_BYTES)
    room = page_buffer(max(depth * step, HUGE_PAGE_BYTES))[:depth * step].reshape(depth, step)

    def work(buffer: NDArray[np.uint8]) -> None:
        nonlocal position
        run_anywhere()
        into = [buffer.data[:size]]
        now, read, done, stopped = time.perf_counter, os.preadv, finished.append, stop.is_set
        try:
            while not stopped():
                offset = next(position, None)
                if offset is None:
                    if once:
                        scratch.forget()
                    position = iter(offsets)
                    continue
                read(fd, into, offset)
                done(now())
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(room[index],), daemon=True) for index in range(depth)]

    def run() -> float:
        begun = len(finished)
        until = time.perf_counter() + sample_s
        while not failures:
            time.sleep(sample_s / 8)
            count = len(finished) - max(begun, 1)
            if time.perf_counter() >= until and count >= max(_LEAST_REQUESTS, depth):
                first = max(begun, 1) - 1
                return max(finished[first + count] - finished[first], 0.0) / count
        raise failures[0]

    for thread in threads:
        thread.start()
    try:
        yield run
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def guard(points: Sequence[Measurement]) -> list[Measurement]:
    """Refuse reads that came from a cache, and those whose time is that of issuing them.

    A buffered random read in less than half the time of the direct one of its size and depth was a hit; a sequential
    one, of which the system reads ahead, where it is twice as fast as any direct read. The time of issuing is that of
    reads without bytes at the same depth.
    """
    medians = [float(np.median(p.samples_s)) for p in points]
    direct = {(p.conditions["size_bytes"], p.conditions["depth"]): m for p, m in zip(points, medians, strict=True)
              if p.probe == READ and p.conditions["how"] == "direct" and p.conditions["pattern"] == "random"}
    fastest = max((p.bytes / m for p, m in zip(points, medians, strict=True)
                   if p.probe == READ and p.conditions["how"] == "direct"), default=None)
    issue = {p.conditions["depth"]: m for p, m in zip(points, medians, strict=True) if p.probe == CALL}
    return [p if (why := _refusal(p, m, direct, fastest, issue)) is None or p.refused is not None
            else p.model_copy(update={"refused": why}) for p, m in zip(points, medians, strict=True)]


def _refusal(point: Measurement, median_s: float, direct: dict[tuple[Condition, Condition], float],
             fastest: float | None, issue: dict[Condition, float]) -> str | None:
    if point.probe != READ:
        return None
    said = point.conditions
    if said["how"] == "buffered":
        same = direct.get((said["size_bytes"], said["depth"]))
        if said["pattern"] == "random" and same is not None and median_s < same / _HIT:
            return f"a page-cache hit: {same / median_s:.1f} × as fast as a direct read"
        if said["pattern"] == "sequential" and fastest is not None and point.bytes / median_s > fastest * _HIT:
            return f"a page-cache hit: {point.bytes / median_s / fastest:.1f} × as fast as any direct read"
    ours = issue.get(said["depth"])
    if ours is not None and said["how"] == "direct" and ours > _OUR_SHARE * median_s:
        return f"issuing takes {100 * ours / median_s:.0f} % of it, so that the drive is not what is measured"
    return None
