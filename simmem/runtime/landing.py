"""Where do direct reads land? Memory in whole pages, and one stretch of it that a process reads into again and again.

On a virtual machine the same drive brought 1.2 to 3.1 GB/s into different stretches of memory, and into each of them
the same (within 8 %) whenever it was used again: what backs a stretch below the guest, no program can see or choose.
So whatever a process measures and whatever it runs lands in the same stretch, first come first placed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

__all__ = ["page_buffer", "read_buffer"]

Bytes = NDArray[np.uint8]

HUGE_PAGE_BYTES = 2 << 20
"""Of x86, and of ARM with pages of 4 KiB. [B]"""
STRETCH_BYTES = 2 << 30
"""Reserved for reads; only what is used of it takes memory, and keeps it. [B]"""


def page_buffer(n_bytes: int) -> Bytes:
    """Zeroed memory of its own that begins on a page; its pages are touched, so that no read pays for that. [B]"""
    memory = _mapped(n_bytes)
    return _zeroed(memory, -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _alignment(n_bytes), n_bytes)


def read_buffer(n_bytes: int, *, empty: bool = True) -> Bytes:
    """The same in the stretch that all reads of this process share; of its own where that is full. [B]

    The place is free again as soon as nobody holds the buffer or a view of it; unless `empty`, it may still hold what
    was read before.
    """
    found, touched = _STRETCH.take(n_bytes)
    found[0 if empty else touched:] = 0
    return found


def _alignment(n_bytes: int) -> int:
    return HUGE_PAGE_BYTES if n_bytes >= HUGE_PAGE_BYTES else mmap.PAGESIZE


def _mapped(n_bytes: int) -> mmap.mmap:
    """Untouched memory with room to align in, in huge pages where the system has them: a read names fewer of them."""
    page = mmap.PAGESIZE
    spare = HUGE_PAGE_BYTES if n_bytes >= HUGE_PAGE_BYTES else 0
    memory = mmap.mmap(-1, max(-(-n_bytes // page) * page, page) + spare)
    if spare and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_BYTES
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE, start, n_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
    return memory


def _zeroed(memory: mmap.mmap, start: int, n_bytes: int) -> Bytes:
    found = np.frombuffer(memory, np.uint8, n_bytes, start)  # keeps the mapping alive
    found[:: mmap.PAGESIZE] = 0
    return found


class _Stretch:
    """Places in one mapping, handed out first fit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._first = 0
        self._taken: dict[int, int] = {}
        """Start → end of the places in use, both relative to the first huge page. [B]"""
        self._touched = 0
        self._returned: deque[int] = deque()  # a collected buffer may come back while the lock is held

    def take(self, n_bytes: int) -> tuple[Bytes, int]:
        """A place, and how much of it from its start on was touched before."""
        if n_bytes == 0:
            return np.zeros(0, np.uint8), 0
        with self._lock:
            while self._returned:
                del self._taken[self._returned.popleft()]
            start = self._gap(n_bytes)
            if start is None:
                return page_buffer(n_bytes), n_bytes
            if self._memory is None:
                self._memory = _mapped(STRETCH_BYTES)
                self._first = -ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) % HUGE_PAGE_BYTES
            self._taken[start] = start + n_bytes
            # Views of an array may outlive it, but not what the array was made of.
            place = (ctypes.c_uint8 * n_bytes).from_buffer(self._memory, self._first + start)
            touched = min(max(self._touched - start, 0), n_bytes)
            self._touched = max(self._touched, start + n_bytes)
        weakref.finalize(place, self._returned.append, start).atexit = False
        return np.frombuffer(memoryview(place), np.uint8), touched

    def _gap(self, n_bytes: int) -> int | None:
        """Where so many bytes fit first."""
        align, start = _alignment(n_bytes), 0
        for begin, end in sorted(self._taken.items()):
            if start + n_bytes <= begin:
                return start
            start = max(start, -(-end // align) * align)
        return start if start + n_bytes <= STRETCH_BYTES else None


_STRETCH = _Stretch()
