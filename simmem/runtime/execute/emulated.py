"""How long would another device have taken? Reads served from memory and held back until it would have finished them.

The device is a clock: batches of reads follow one another on it, each taking the time that the link's surface gives for
its size and depth. The bytes are real, and so is everything that happens to them afterwards; only when they arrive is
made up. Where memory cannot be copied three times as fast as the device reads, nothing is emulated.
"""

from __future__ import annotations

import queue
import threading
import time
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from simmem.cost.roofline import storage_seconds_per_request
from simmem.errors import MachineError
from simmem.runtime.cores import run_anywhere
from simmem.runtime.reader import Reads, Ticket, page_buffer
from simmem.spec.device import Link
from simmem.units import format_quantity

__all__ = ["LEAST_RATIO", "EmulatedStore"]

Bytes = NDArray[np.uint8]

LEAST_RATIO = 3.0
"""Copying has to be so many times as fast as the device that is emulated."""
SPIN_S = 100e-6
"""The last stretch of a wait is not slept: a sleeping thread wakes so late. [s]"""
TRIAL_BYTES = 64 << 20
_ATTEMPTS = 3


class _HeldBack(Ticket):
    """Reads whose bytes may be there before the device would have brought them."""

    due_s = 0.0
    """When the device would have. [s]"""

    def wait(self) -> None:
        super().wait()
        while (left := self.due_s - time.perf_counter()) > 0.0:
            time.sleep(left - SPIN_S if left > SPIN_S else 0.0)
        self.free_s = max(self.free_s, self.due_s)


class EmulatedStore:
    """A storage device of which only the times are known; a context manager that ends its thread.

    Parameters
    ----------
    link : its read surface.
    depth : reads in flight at most.
    image : what it holds. Reads behind its end begin again at its start, so a part stands for a larger file whose
        contents do not matter.
    read_bytes : what is usually read as one; how fast memory is copied is tried with it. [B]
    timed : False where nothing is read while anything is timed: reads are then as fast as memory, whatever that is.

    Raises
    ------
    MachineError
        Memory here is too slow for this device.
    """

    def __init__(self, link: Link, depth: int, image: Bytes, read_bytes: int, *, timed: bool = True) -> None:
        self._link, self._depth, self._image, self._timed = link, depth, image, timed
        self.copy_bytes_per_s = 0.0
        for _ in range(_ATTEMPTS if timed else 0):  # a disturbed moment is not what memory can
            if self.copy_bytes_per_s < LEAST_RATIO * link.rate.value:
                self.copy_bytes_per_s = max(self.copy_bytes_per_s, _copy_rate(_rows(image, read_bytes)))
        if timed and self.copy_bytes_per_s < LEAST_RATIO * link.rate.value:
            have, want = (format_quantity(rate, "bytes_per_s") for rate in (self.copy_bytes_per_s, link.rate.value))
            raise MachineError(f"copies {have} of scattered reads, less than {LEAST_RATIO:g} times the {want} of the "
                               "device to be emulated", tier="dram")
        self.busy_s = 0.0
        """Processor time spent on serving reads. [s]"""
        self.late = 0
        """Batches that took longer to copy than the device would have taken to read them."""
        self._free_s = 0.0
        self._queue: queue.SimpleQueue[tuple[_HeldBack, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="simmem-emulated", daemon=True)
        self._thread.start()

    def submit(self, asked: Reads) -> Ticket:
        ticket = _HeldBack(asked, 1 if len(asked.offsets) else 0)
        if len(asked.offsets):
            self._queue.put((ticket, time.perf_counter()))
        return ticket

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        run_anywhere()
        while (task := self._queue.get()) is not None:
            ticket, handed_in = task
            problem: BaseException | None = None
            ticket.start_s = max(handed_in, self._free_s)
            self._free_s = ticket.due_s = ticket.start_s + (self.device_seconds(ticket.asked) if self._timed else 0.0)
            busy = time.thread_time()
            try:
                self._copy(ticket.asked)
            except BaseException as error:  # noqa: BLE001 - goes to whoever waits for it
                problem = error
            self.busy_s += time.thread_time() - busy
            if time.perf_counter() > self._free_s:
                self.late += 1
            ticket.finish(problem)

    def device_seconds(self, asked: Reads) -> float:
        """What the device takes for these reads. [s]"""
        n = len(asked.offsets)
        return float(n * storage_seconds_per_request(self._link, asked.n_bytes / n, min(self._depth, n)))

    def _copy(self, asked: Reads) -> None:
        if (asked.places != np.cumsum(asked.sizes) - asked.sizes).any():
            raise MachineError("an emulated device fills a buffer from its start")
        row = int(np.gcd.reduce(np.r_[asked.offsets, asked.sizes]))  # the longest that all reads are made of
        counts = asked.sizes // row
        ends = np.cumsum(counts)
        which = np.arange(ends[-1]) + np.repeat(asked.offsets // row - (ends - counts), counts)
        into = asked.buffer[: asked.n_bytes].reshape(-1, row)
        np.take(_rows(self._image, row), which, axis=0, out=into, mode="wrap")


def _rows(image: Bytes, row_bytes: int) -> Bytes:
    return image[: len(image) // row_bytes * row_bytes].reshape(-1, row_bytes)


def _copy_rate(rows: Bytes) -> float:
    """Bytes a second of copying scattered rows, the best of a few trials: what memory can, whoever else uses it."""
    n = max(min(TRIAL_BYTES, rows.nbytes) // rows.shape[1], 1)
    which = np.random.default_rng(0).integers(0, len(rows), n)
    into = page_buffer(n * rows.shape[1]).reshape(n, -1)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        np.take(rows, which, axis=0, out=into, mode="wrap")
        took.append(time.perf_counter() - began)
    return float(into.nbytes / min(took))
