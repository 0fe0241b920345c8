"""What does upkeep of a cache of rows cost: rows gathered, scattered, moved into holes and appended?

A row is a unit as the flash window keeps it, one FFN neuron with all its weights. Rows lie scattered over an array of
at least four last-level caches, and each call takes the next rows of one random order of them all, so that they come
from memory. The compact side of a copy is small and stays in the cache where it fits, as it does in an executor.
(`index_copy_` goes element by element: rows of 16-bit numbers take longer than as many bytes of 32-bit ones.)
Every byte counts once for each side: read here, written there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmem.runtime.probe.base import Case, Setting
from simmem.runtime.probe.watched import watched

__all__ = ["GATHER", "SCATTER", "UPKEEP", "cases", "gather_rows", "replace_rows", "scatter_rows"]

Ints = NDArray[np.int64]

GATHER, SCATTER, UPKEEP = "gather", "scatter", "upkeep"

ROW_BYTES = tuple(4096 * k for k in (1, 2, 3, 4, 6, 8, 12))
"""OPT-125M's neurons in fp32 are 6 KiB, OPT-6.7B's in 16 bits 16 KiB, Llama 2 70B's 48 KiB."""
ROWS = (1, 4, 16, 64, 256, 1024)
"""Of one call."""
_MOST_BYTES = 16 << 20
"""Moved by one call."""
_CACHES = 4
_DTYPES = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2)}
_SAMPLE_S = 1e-3


def gather_rows(source: Any, index: Any, into: Any) -> None:
    """Rows `index` (n,) of `source` (rows, width), one after the other, into `into` (n, width)."""
    import torch

    torch.index_select(source, 0, index, out=into)


def scatter_rows(rows: Any, index: Any, into: Any) -> None:
    """`rows` (n, width) over the rows `index` (n,), each once, of `into` (rows, width)."""
    into.index_copy_(0, index, rows)


def replace_rows(table: Any, whole: NDArray[np.void], holes: Ints, movers: Ints, new: Any) -> None:
    """Delete the rows `holes` of a compact table and append as many new ones: two copies, as the executor makes them.

    Parameters
    ----------
    table : (rows, width)
    whole : its rows, each one element, (rows,): numpy moves those in half of torch's time.
    holes : rows to delete, (n,).
    movers : the last n rows in use, one behind the other; they move into the holes, and the new ones take their place.
    new : rows to append, (n, width).
    """
    whole[holes] = whole[movers]
    table[int(movers[0]):int(movers[0]) + len(holes)].copy_(new)


class _Table:
    """One flat array that every row size cuts into rows, and one random order of each."""

    def __init__(self, setting: Setting) -> None:
        # A call does not wrap around, so up to two of them are left out of a cycle.
        self.size_bytes = _CACHES * setting.cache_bytes + 2 * _MOST_BYTES
        self.fits = self.size_bytes + _MOST_BYTES <= setting.memory_bytes
        self.seed = setting.seed
        self.at = 0
        self._flat: Any = None
        self._orders: dict[int, Any] = {}

    def rows(self, row_bytes: int, dtype: str) -> Any:
        """(rows, width)"""
        import torch

        if self._flat is None:
            self._flat = torch.randint(0, 127, (self.size_bytes,), dtype=torch.uint8)
        name, size = _DTYPES[dtype]
        n = self.size_bytes // row_bytes
        return self._flat[:n * row_bytes].view(getattr(torch, name)).view(n, row_bytes // size)

    def order(self, row_bytes: int) -> Any:
        """A random permutation of the rows, (rows,) int64."""
        import torch

        if row_bytes not in self._orders:
            random = torch.Generator().manual_seed(self.seed)
            self._orders[row_bytes] = torch.randperm(self.size_bytes // row_bytes, generator=random)
        return self._orders[row_bytes]


def cases(setting: Setting) -> list[Case]:
    """Gathers and scatters over row sizes and numbers of rows, and upkeep of a table, on the CPU."""
    table = _Table(setting)
    if not table.fits:
        return []
    sizes, counts = (ROW_BYTES[1::4], ROWS[2::2]) if setting.quick else (ROW_BYTES, ROWS)
    threads = sorted({1, setting.threads})
    found = []
    for size in sizes:
        for n in (n for n in counts if n * size <= _MOST_BYTES):
            # Rows are copied whole, whatever is in them: every other size in the other precision as well.
            ways = [(d, t) for d in (_DTYPES if size in ROW_BYTES[::2] and not setting.quick else ("bf16",))
                    for t in threads]
            found += [_case(probe, table, n, size, *way, work) for way in ways
                      for probe, work in ((GATHER, _gather), (SCATTER, _scatter))]
            found.append(_case(UPKEEP, table, n, size, "bf16", 1, _upkeep))
    return found


Work = Callable[[_Table, int, int, str], Callable[[], None]]


def _case(probe: str, table: _Table, n: int, row_bytes: int, dtype: str, threads: int, work: Work) -> Case:
    setup, refuse = watched(threads, lambda: work(table, n, row_bytes, dtype), sample_s=_SAMPLE_S)
    sides = 4 if probe == UPKEEP else 2
    return Case(probe, {"agent": "cpu", "rows": n, "row_bytes": row_bytes, "dtype": dtype, "threads": threads,
                        "level": "dram", "working_set_bytes": table.size_bytes},
                setup, bytes=float(sides * n * row_bytes), requests=2.0 if probe == UPKEEP else 1.0,
                priority=5, refuse=refuse)


def _next(table: _Table, order: Any, n: int) -> Any:
    """The next n of an order."""
    table.at = table.at + n if table.at + 2 * n <= len(order) else 0
    return order[table.at:table.at + n]


def _gather(table: _Table, n: int, row_bytes: int, dtype: str) -> Callable[[], None]:
    source, order = table.rows(row_bytes, dtype), table.order(row_bytes)
    into = source[:n].clone()
    return lambda: gather_rows(source, _next(table, order, n), into)


def _scatter(table: _Table, n: int, row_bytes: int, dtype: str) -> Callable[[], None]:
    into, order = table.rows(row_bytes, dtype), table.order(row_bytes)
    rows = into[:n].clone()
    return lambda: scatter_rows(rows, _next(table, order, n), into)


def _upkeep(table: _Table, n: int, row_bytes: int, dtype: str) -> Callable[[], None]:
    import torch

    rows, order = table.rows(row_bytes, dtype), table.order(row_bytes)
    whole, half = rows.view(torch.uint8).numpy().view(f"V{row_bytes}")[:, 0], len(rows) // 2
    new, holes, tail = rows[:n].clone(), order[order < half].numpy(), np.arange(half, len(rows))
    for start in range(0, len(holes), n):  # as the executor has them
        holes[start:start + n].sort()
    at = 0

    def step() -> None:
        nonlocal at
        at = at + n if at + 2 * n <= min(len(holes), half) else 0
        replace_rows(rows, whole, holes[at:at + n], tail[at:at + n], new)

    return step
