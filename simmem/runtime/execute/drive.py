"""How fast is the drive just now? Plain reads of the file that plans read, between their runs.

A drive that others share, or that is still busy with what was written, is another one some minutes later. So a plan's
prediction, which rests on an earlier calibration, is judged beside what plain reads of the same sizes and depths bring
in the same minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from simmem.errors import MachineError
from simmem.runtime.probe.scratch import open_file
from simmem.runtime.probe.storage import read_seconds

__all__ = ["Reads", "plain_reads", "settle"]

Reads = tuple[int, int]
"""Size of a read [B], and how many are in flight."""

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
