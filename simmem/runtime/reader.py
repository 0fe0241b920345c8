"""How do many small reads of one file reach memory at the rate of the drive, and past the page cache?

Reads are handed in together, as arrays of offsets and sizes. There is one thread for each read in flight, every one
with its own queue, so that batches begin in the order of handing in and nothing is shared on the way but the file. A
read that brings less than was asked for is an error that names file and offset, never a short answer.

Asynchronous reads of the system (io_submit, through ctypes) were tried: on a virtio drive one thread with 32 in flight
brought 0.75 to 1.0 of what 32 threads brought, as it submits alone; so there is no second way.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError
from simmem.runtime.cores import run_anywhere

__all__ = ["HUGE_PAGE_BYTES", "Reader", "Reads", "Store", "Ticket", "in_chunks", "open_direct", "page_buffer", "reads"]

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

HUGE_PAGE_BYTES = 2 << 20
"""Of x86 and of ARM with pages of 4 KiB. [B]"""


class Reads(NamedTuple):
    """Reads that belong together: offsets in the file, sizes, and where in `buffer` each goes. [B]"""

    offsets: Ints
    sizes: Ints
    places: Ints
    buffer: Bytes

    @property
    def n_bytes(self) -> int:
        return int(self.sizes.sum())


def reads(offsets: Ints, sizes: Ints, buffer: Bytes) -> Reads:
    """Reads that lie one behind the other in `buffer`, from its start."""
    return Reads(offsets, sizes, np.cumsum(sizes) - sizes, buffer)


def in_chunks(offset: int, n_bytes: int, chunk_bytes: int, buffer: Bytes) -> Reads:
    """Reads of a stretch of the file in chunks, the last of which may be shorter. [B]"""
    starts = np.arange(0, n_bytes, chunk_bytes, dtype=np.int64)
    return Reads(offset + starts, np.minimum(chunk_bytes, n_bytes - starts), starts, buffer)


def page_buffer(n_bytes: int) -> Bytes:
    """Zeroed memory that begins on a page; its pages are touched, so that no read pays for that. [B]

    It lies in huge pages as far as it fills whole ones and the system has them. A direct read hands the drive every
    stretch of memory that it fills: 256 MiB of small pages were 2,000 to 43,000 stretches, as the system happened to
    have them, and a virtual drive brought 2.2 to 1.0 GB/s into them; in huge pages 128, and always 2.6.
    """
    page, advice = mmap.PAGESIZE, getattr(mmap, "MADV_HUGEPAGE", 0)
    huge = n_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES if advice else 0
    size = max(-(-n_bytes // page) * page, page) + (HUGE_PAGE_BYTES if huge else 0)
    # Private: memory that could be shared is not given huge pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found = np.frombuffer(memory, np.uint8)  # keeps the mapping alive
    if huge:
        start = -found.ctypes.data % HUGE_PAGE_BYTES
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(advice, start, huge)
        found = found[start:]
    found = found[:n_bytes]
    found[::page] = 0
    return found


@contextlib.contextmanager
def open_direct(path: Path) -> Iterator[int]:
    """A descriptor whose reads go past the page cache. Raises MachineError where the file system has no such reads."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise MachineError("lies on a file system without direct reads; choose another folder",
                               file=str(path)) from None
        raise MachineError(f"cannot be read: {error.strerror}", file=str(path)) from None
    try:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, 48, 1)  # F_NOCACHE, which the module does not name
        yield fd
    finally:
        os.close(fd)


class Ticket:
    """Reads that were handed in; times by `time.perf_counter`. [s]"""

    def __init__(self, asked: Reads, parts: int) -> None:
        self.asked = asked
        self.start_s = 0.0
        self.free_s = 0.0
        self.error: BaseException | None = None
        self._left = parts
        self._lock = threading.Lock()
        self._done = threading.Event()
        if parts == 0:
            self.start_s = self.free_s = time.perf_counter()
            self._done.set()

    def begin(self) -> None:
        """A part of it is begun."""
        if self.start_s == 0.0:
            self.start_s = time.perf_counter()

    def finish(self, error: BaseException | None = None) -> None:
        """A part of it is done, or `error` came in between."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            last = self._left == 0
        if last:
            self.free_s = time.perf_counter()
            self._done.set()

    def wait(self) -> None:
        """Return when everything is in the buffer. Raises what went wrong."""
        self._done.wait()
        if self.error is not None:
            raise self.error


class Store(Protocol):
    """Where weights are read from: a file, or memory that behaves like a device."""

    def submit(self, asked: Reads) -> Ticket:
        """Hand in reads; they begin when all that was handed in before has begun."""

    def close(self) -> None:
        """Drop what has not begun, wait for what has, end all threads."""


class Reader:
    """Reads one file; a context manager that leaves no thread behind.

    Parameters
    ----------
    fd : opened for direct reads (`open_direct`), or not.
    name : of the file, for errors.
    depth : reads in flight at most.
    """

    def __init__(self, fd: int, name: str, depth: int) -> None:
        self._fd, self._name = fd, name
        self._stopped = False
        self._queues: list[queue.SimpleQueue[tuple[Ticket, slice] | None]] = [
            queue.SimpleQueue() for _ in range(depth)]
        self._threads = [threading.Thread(target=self._run, args=(mine,), name="simmem-reader", daemon=True)
                         for mine in self._queues]
        for thread in self._threads:
            thread.start()

    def submit(self, asked: Reads) -> Ticket:
        used = min(len(self._queues), len(asked.offsets))
        ticket = Ticket(asked, used)
        for index in range(used):
            self._queues[index].put((ticket, slice(index, None, used)))
        return ticket

    def close(self) -> None:
        self._stopped = True
        for mine in self._queues:
            mine.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _run(self, mine: queue.SimpleQueue[tuple[Ticket, slice] | None]) -> None:
        run_anywhere()
        while (task := mine.get()) is not None:
            ticket, share = task
            problem: BaseException | None = None
            try:
                ticket.begin()
                self._read(ticket.asked, share)
            except BaseException as error:  # noqa: BLE001 - goes to whoever waits for it
                problem = error
            ticket.finish(problem)

    def _read(self, asked: Reads, share: slice) -> None:
        view, preadv, fd = asked.buffer.data, os.preadv, self._fd
        for offset, size, place in zip(asked.offsets[share].tolist(), asked.sizes[share].tolist(),
                                       asked.places[share].tolist(), strict=True):
            if self._stopped:
                raise MachineError("reading was stopped", file=self._name)
            try:
                got = preadv(fd, [view[place:place + size]], offset)
            except OSError as error:
                raise MachineError(f"reading {size} bytes at offset {offset} failed: {error.strerror}",
                                   file=self._name) from None
            if got != size:
                raise MachineError(f"a read of {size} bytes at offset {offset} brought {got}: the file is shorter "
                                   "than it was", file=self._name)
