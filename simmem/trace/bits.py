"""How are sets of units counted, joined and read in runs without looking at single units?

Sets are rows of 64-bit words, bit u % 64 of word u // 64 being unit u: a union of 16384 units is 256
machine instructions, and so is its size. Everything here works on the last axis.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "count", "runs", "words_of"]

Words = NDArray[np.uint64]
_BITS = 64


def words_of(active: NDArray[np.uint8]) -> Words:
    """Packed bytes (..., ceil(n_units / 8)) as words (..., ceil(n_units / 64)); a view where it can be."""
    spare = -active.shape[-1] % 8
    if spare:
        padded = np.zeros((*active.shape[:-1], active.shape[-1] + spare), np.uint8)
        padded[..., : active.shape[-1]] = active
        active = padded
    return np.ascontiguousarray(active).view("<u8").astype(np.uint64, copy=False)


def count(words: Words) -> NDArray[np.int64]:
    """Units in each set, shape `words.shape[:-1]`."""
    # uint32 sums: a third quicker than int64 here, and no row has 2**32 units
    sums: NDArray[np.uint32] = np.add.reduce(np.bitwise_count(words), axis=-1, dtype=np.uint32)
    return sums.astype(np.int64)


def runs(words: Words, gap_units: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs of units in each set when gaps of at most `gap_units` absent units do not end a run.

    Spread every unit over the `gap_units` above it: runs that are joined grow together, others stay apart, each
    by `gap_units` longer. So counting the spread set and its runs is enough.

    Returns
    -------
    n_runs, spanned : of shape `words.shape[:-1]`; `spanned` counts the units in runs, with those in the gaps.
    """
    gap_units = min(gap_units, words.shape[-1] * _BITS)
    spare = -(-gap_units // _BITS)  # what grows past the top must be counted too
    spread = np.zeros((*words.shape[:-1], words.shape[-1] + spare), np.uint64)
    spread[..., : words.shape[-1]] = words
    covered = 1
    while covered <= gap_units:  # by doubling: 1, 2, 4 … and a rest
        step = min(covered, gap_units + 1 - covered)
        spread |= _up(spread, step)
        covered += step
    n_runs = count(spread & ~_up(spread, 1))
    return n_runs, count(spread) - gap_units * n_runs


def _up(words: Words, places: int) -> Words:
    """Every unit u becomes unit u + places; what leaves the row is lost."""
    whole, part = divmod(places, _BITS)
    if part == 0:
        moved = np.zeros_like(words)
        moved[..., whole:] = words[..., : words.shape[-1] - whole]
        return moved
    if whole:
        words = _up(words, whole * _BITS)
    moved = words << np.uint64(part)
    moved[..., 1:] |= words[..., :-1] >> np.uint64(_BITS - part)
    return moved
