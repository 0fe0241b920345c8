"""Which units of a set come first by a number that each of them has, when sets are rows of words?

The numbers are uses so far, the token of the last use, of the next one. Many units: they are kept bit by bit, plane b
of a table holding bit b of every unit's number, 64 units to a word. The n lowest of a set are then found by a descent
from the highest bit to the lowest, a handful of machine instructions for 64 units at each, in all caches at once. Few
units (a model's experts): a sort of plain integers takes fewer calls. Everything works on the last axis.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simmem.trace.bits import Words, count

__all__ = ["Numbers", "first_ids", "numbers"]

Ints = NDArray[np.int64]
_ALL = np.uint64(2**64 - 1)
_NONE = np.uint64(0)
_WORD = 64
_SORTED = 4
_FEW_UNITS = 1 << 14
"""Up to so many in all caches together, sorting is quicker than descending; measured, and not sharp."""


class Numbers(Protocol):
    """A number for every unit of (…, n_words) words of units, at first 0; `at` is the slice of words that is meant."""

    def put(self, members: Words, value: int, at: slice) -> None:
        """Give every member the number `value`."""

    def increment(self, members: Words, at: slice) -> None:
        """Add 1 to the number of every member."""

    def take(self, other: Numbers, members: Words, at: slice) -> None:
        """Give every member the number it has in `other`, a copy of numbers of the same kind and shape."""

    def copy(self) -> Numbers: ...

    def lowest(self, members: Words, n: Ints) -> Words:
        """The n members of each row with the lowest numbers; of equal ones those with the lowest ids."""

    def highest(self, members: Words, n: Ints) -> Words:
        """The n members of each row with the highest numbers, all where there are fewer; of equal ones those with
        the highest ids."""


def numbers(shape: tuple[int, ...], largest: int, sets: int = 1) -> Numbers:
    """Numbers 0 … `largest` for units in words of that shape, to be asked about `sets` times as many at once."""
    n_units = int(np.prod(shape)) * _WORD * sets
    kind = _Listed if n_units <= _FEW_UNITS else _Planes
    return kind(shape, largest)


class _Planes:
    """Bits are kept inverted: a set bit of `_clear` says that the number's is not set, which is what choosing asks."""

    def __init__(self, shape: tuple[int, ...], largest: int) -> None:
        self._clear = np.full((largest.bit_length(), *shape), _ALL)
        self._in_use = 0

    def put(self, members: Words, value: int, at: slice) -> None:
        self._in_use = max(self._in_use, value.bit_length())
        others = ~members
        for bit in range(self._in_use):
            plane = self._clear[bit, ..., at]
            if value >> bit & 1:
                plane &= others
            else:
                plane |= members

    def increment(self, members: Words, at: slice) -> None:
        carry = members
        for bit, clear in enumerate(self._clear[..., at]):
            np.bitwise_xor(clear, carry, out=clear)
            carry = carry & clear  # it was set before, so that it is clear now
            if not carry.any():
                self._in_use = max(self._in_use, bit + 1)
                return

    def take(self, other: Numbers, members: Words, at: slice) -> None:
        assert isinstance(other, _Planes)
        self._in_use = max(self._in_use, other._in_use)
        mine = self._clear[..., at]
        mine &= ~members
        mine |= other._clear[..., at] & members

    def copy(self) -> Numbers:
        twin = _Planes((), 0)
        twin._clear, twin._in_use = self._clear.copy(), self._in_use
        return twin

    def lowest(self, members: Words, n: Ints) -> Words:
        chosen, tied, left = self._descend(members, n, _NONE)
        if left.any():
            chosen |= first_ids(tied, left)
        return chosen

    def highest(self, members: Words, n: Ints) -> Words:
        chosen, tied, left = self._descend(members, n, _ALL)
        if left.any():
            chosen |= tied ^ first_ids(tied, count(tied) - left)
        return chosen

    def _descend(self, members: Words, n: Ints, flip: np.uint64) -> tuple[Words, Words, Ints]:
        """Members that are in for sure, those at the border, all of one number, and how many of these are still due."""
        tied, left = members, n
        chosen = np.zeros_like(members)
        for plane in self._clear[: self._in_use][::-1]:
            first = tied & (plane ^ flip if flip else plane)
            n_first = count(first)
            all_in = n_first <= left
            whole = np.where(all_in, _ALL, _NONE)[..., None]
            tied = first ^ (tied & whole)  # the first ones where they are too many, else those behind them
            first &= whole
            chosen |= first
            left = left - n_first * all_in
            if not left.any():
                break
        return chosen, tied, left


class _Listed:
    """One integer a unit, which orders by number and then by id."""

    def __init__(self, shape: tuple[int, ...], largest: int) -> None:
        self._width = shape[-1] * _WORD if shape else 0
        self._beyond = (largest + 1) * self._width
        self._ids = np.arange(self._width)
        self._keys = np.broadcast_to(self._ids, (*shape[:-1], self._width)).copy()

    def put(self, members: Words, value: int, at: slice) -> None:
        mine, ids = self._keys[..., _units(at)], self._ids[_units(at)]
        np.copyto(mine, value * self._width + ids, where=_unpack(members))

    def increment(self, members: Words, at: slice) -> None:
        mine = self._keys[..., _units(at)]
        mine += _unpack(members).view(np.uint8) * np.int64(self._width)

    def take(self, other: Numbers, members: Words, at: slice) -> None:
        assert isinstance(other, _Listed)
        np.copyto(self._keys[..., _units(at)], other._keys[..., _units(at)], where=_unpack(members))

    def copy(self) -> Numbers:
        twin = _Listed((), 0)
        twin._width, twin._beyond, twin._ids, twin._keys = self._width, self._beyond, self._ids, self._keys.copy()
        return twin

    def lowest(self, members: Words, n: Ints) -> Words:
        keys = np.where(_unpack(members), self._keys, self._beyond)
        return _pack(keys <= _border(keys, n)) & members

    def highest(self, members: Words, n: Ints) -> Words:
        keys = np.where(_unpack(members), -self._keys, 1)
        return _pack(keys <= _border(keys, n)) & members


def _border(keys: Ints, n: Ints) -> Ints:
    """(…, 1) the n-th lowest key of each row, one below all of them where n is 0."""
    most = min(int(n.max(initial=0)), keys.shape[-1])
    if most * _SORTED < keys.shape[-1]:  # worth setting the lowest apart from the rest first
        keys = np.partition(keys, most, axis=-1)[..., : most + 1]
    keys = np.sort(keys, axis=-1)
    place = np.clip(n - 1, 0, keys.shape[-1] - 1)
    border = np.take_along_axis(keys, place[..., None], axis=-1)
    return np.where(n[..., None] > 0, border, keys[..., :1] - 1)


def first_ids(members: Words, n: Ints) -> Words:
    """The n members of each row with the lowest ids; all where there are fewer."""
    per_word = np.bitwise_count(members)
    due = n[..., None] - np.cumsum(per_word, axis=-1, dtype=np.int64) + per_word
    chosen = np.where(per_word <= due, members, _NONE)
    where = np.nonzero((per_word > due) & (due > 0))  # the word of a row in which its last one lies
    if where[0].size:
        bits = _unpack(members[where][:, None])
        chosen[where] = _pack(bits & (np.cumsum(bits, axis=1, dtype=np.int64) <= due[where][:, None]))[:, 0]
    return chosen


def _unpack(words: Words) -> NDArray[np.bool_]:
    """(…, n_words) → (…, 64 n_words)."""
    octets = np.ascontiguousarray(words).astype("<u8", copy=False).view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little").view(np.bool_)


def _pack(bits: NDArray[np.bool_]) -> Words:
    return np.packbits(bits, axis=-1, bitorder="little").view("<u8").astype(np.uint64, copy=False)


def _units(at: slice) -> slice:
    return slice(None if at.start is None else at.start * _WORD, None if at.stop is None else at.stop * _WORD)
