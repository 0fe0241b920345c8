"""How fast is the drive just now? Plain reads of the file that plans read, between their runs.

A drive that others share, or that is still busy with what was written, is another one some minutes later. So a plan's
prediction, which rests on an earlier calibration, is judged beside what plain reads of the same sizes and depths bring
in the same minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmem.errors import MachineError
from simmem.runtime.probe.scratch import BLOCK_BYTES, open_file
from simmem.runtime.probe.storage import other_work, read_seconds
from simmem.runtime.reader import Reader, in_chunks, open_direct, page_buffer

__all__ = ["Reads", "batch_reads", "plain_reads", "settle"]

Reads = tuple[int, int]
"""Size of a read [B], and how many are in flight."""

_BATCHES = 3
"""Of each size, in a look."""
_SETTLING = (1 << 20, 8)
_SETTLED_WITHIN = 0.15
_SETTLED_AFTER = 4
_PAUSE_S = 0.5


def plain_reads(file: Path, read: Reads, samples: int = 5) -> list[float]:
    """Seconds per plain direct read, in samples of 0.03 s, behind one that is not counted. [s]

    Raises MachineError where the file cannot be read past the page cache.
    """
    with open_file(file) as opened:
        if opened.direct_fd is None:
            raise MachineError(f"cannot be read past the page cache: {opened.why_not_direct}", file=str(file))
        try:
            return read_seconds(opened, *read, samples=samples)
        except OSError as error:
            raise MachineError(f"reading it failed: {error.strerror}", file=str(file)) from None


def batch_reads(file: Path, amounts: Sequence[int], chunk_bytes: int, depth: int) -> float:
    """Seconds of plain reads that begin and end as a token's do: batch by batch, each behind other work. [s]

    Each time is that from the first read of a batch begun to the last one done.

    amounts : of each batch; of equal ones some are read for all. [B]

    Raises MachineError where the file cannot be read past the page cache.
    """
    compute, buffer, random = other_work(), _room(max(amounts)), np.random.default_rng()
    blocks, total_s = file.stat().st_size // BLOCK_BYTES, 0.0
    with open_direct(file) as fd, Reader(fd, str(file), depth) as reader:
        for n_bytes in sorted({n for n in amounts if n}):
            took = []
            for _ in range(_BATCHES):
                start = int(random.integers(blocks - n_bytes // BLOCK_BYTES)) * BLOCK_BYTES
                compute()
                ticket = reader.submit(in_chunks(start, n_bytes, chunk_bytes, buffer))
                ticket.wait()
                took.append(ticket.free_s - ticket.start_s)
            total_s += list(amounts).count(n_bytes) * float(np.median(took))
    return total_s


@lru_cache(maxsize=1)
def _room(n_bytes: int) -> NDArray[np.uint8]:
    """Kept: touching its pages takes longer than a look."""
    return page_buffer(n_bytes)


def settle(file: Path, limit_s: float, said: Callable[[str], None] = lambda _: None) -> float:
    """Wait until plain reads take the same time again and again, as they do not while a drive still writes.

    Returns the seconds it took; at most about `limit_s`, and then says that they still differ. [s]
    """
    begun = time.monotonic()
    seen: list[float] = []
    while True:
        if file.stat().st_size < 2 * _SETTLING[0]:
            return 0.0
        seen.append(float(np.median(plain_reads(file, _SETTLING))))
        last = seen[-_SETTLED_AFTER:]
        took = time.monotonic() - begun
        if len(last) == _SETTLED_AFTER and max(last) <= (1 + _SETTLED_WITHIN) * min(last):
            return took
        if took > limit_s:
            said(f"the drive has not settled in {took:.0f} s: plain reads of 1 MiB took "
                 f"{1e3 * min(last):.2f} to {1e3 * max(last):.2f} ms")
            return took
        time.sleep(_PAUSE_S)
