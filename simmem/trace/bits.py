"""How are sets of units counted, joined and read in runs without looking at single units?

Sets are rows of 64-bit words, bit u % 64 of word u // 64 being unit u: a union of 16384 units is 256
machine instructions, and so is its size. Everything here works on the last axis.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "bridged", "count", "runs", "words_of"]

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


def runs(words: Words) -> NDArray[np.int64]:
    """Runs of adjacent units in each set, shape `words.shape[:-1]`: units whose lower neighbour is absent."""
    return count(words & ~_up(words, 1))


def bridged(words: Words, gap_units: int) -> Words:
    """Each set with its gaps of at most `gap_units` absent units filled, one gap never more than that.

    A morphological closing: spread every unit over the `gap_units` above it, then keep a unit only where
    all `gap_units` above it are present. By doubling, so in 2·log2(gap_units + 1) shifts. The result has
    spare words above, which stay empty.
    """
    if gap_units <= 0:
        return words
    gap_units = min(gap_units, words.shape[-1] * _BITS)
    spare = -(-gap_units // _BITS)
    closed = np.zeros((*words.shape[:-1], words.shape[-1] + spare), np.uint64)
    closed[..., : words.shape[-1]] = words
    for step in _doublings(gap_units + 1):
        closed |= _up(closed, step)
    for step in _doublings(gap_units + 1):
        closed &= _down(closed, step)
    return closed


def _doublings(width: int) -> list[int]:
    """Shifts after which a bit covers `width` places: 1, 2, 4 … and a rest."""
    steps, covered = [], 1
    while covered < width:
        steps.append(min(covered, width - covered))
        covered += steps[-1]
    return steps


def _up(words: Words, places: int) -> Words:
    """Every unit u becomes unit u + places; what leaves the row is lost."""
    whole, part = divmod(places, _BITS)
    moved = np.zeros_like(words)
    n = words.shape[-1] - whole
    if n <= 0:
        return moved
    np.left_shift(words[..., :n], np.uint64(part), out=moved[..., whole:])
    if part:
        moved[..., whole + 1 :] |= words[..., : n - 1] >> np.uint64(_BITS - part)
    return moved


def _down(words: Words, places: int) -> Words:
    """Every unit u becomes unit u - places; what leaves the row is lost."""
    whole, part = divmod(places, _BITS)
    moved = np.zeros_like(words)
    n = words.shape[-1] - whole
    if n <= 0:
        return moved
    np.right_shift(words[..., whole:], np.uint64(part), out=moved[..., :n])
    if part:
        moved[..., : n - 1] |= words[..., whole + 1 :] << np.uint64(_BITS - part)
    return moved
