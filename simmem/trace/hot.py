"""How often is every unit used, and how many of the units that a token uses are the frequent ones?

A hot/cold placement ranks units by frequency. Ranked by the very tokens that are timed afterwards, the hot ones would
always be the right ones; so frequencies come from tokens of the same trace that are not timed (PowerInfer, arXiv
2312.12456, §6.1: profiled on general text, used on other tasks). Units that were used equally often are alike:
they form a class, and which of a class lie where is left open.

Nothing here looks at single units: tokens are sets of bits, added up 64 units at a time (the carries of a binary
adder), and a class is a set too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from simmem.errors import TraceError
from simmem.trace.bits import Words, count, words_of
from simmem.trace.trace import Trace

__all__ = ["MAX_CLASSES", "HotTable", "hot_table"]

Ints = NDArray[np.int64]

MAX_CLASSES = 64
"""Classes of frequency at most; of a longer profile, counts that lie next to each other share one."""
_TOGETHER = 64
"""Sets, of classes and tokens, that are counted at once: with fewer the calls take longer than the counting."""


@dataclass(frozen=True)
class HotTable:
    """Classes of equally frequent units, most frequent first. C classes, L layers, T tokens."""

    frequency: NDArray[np.float64]
    """(L, C) mean share of the profile tokens that used a unit of the class; 0 where the class is empty."""
    units: Ints
    """(L, C) units in the class; a layer's sum to all of its units."""
    profile_tokens: int
    classes: Words
    """(C, L, W) the units of each class."""
    words: Words
    """(·, L, W) the units that each token of the trace uses."""
    tokens: Ints
    """(T,) those that are timed."""

    def used_by(self, rows: Ints) -> Ints:
        """(n, L, C) units of the class that some timed tokens use, each counted when first asked for."""
        known, found = self._known
        new = np.unique(rows[~known[rows]])
        if len(new):
            found[new], known[new] = _used_of(self.classes, self.units, self.words, self.tokens[new]), True
        return found[rows]

    @cached_property
    def _known(self) -> tuple[NDArray[np.bool_], Ints]:
        """Which tokens were counted, and what was."""
        return np.zeros(len(self.tokens), np.bool_), np.zeros((len(self.tokens), *self.units.shape), np.int64)


def hot_table(trace: Trace, tokens: Ints) -> HotTable:
    """Classes by frequency over the tokens of a trace that are not in `tokens`, and what those in `tokens` use of them.

    Parameters
    ----------
    tokens : (T,) indices of the tokens that are timed.

    Raises
    ------
    TraceError
        Every token of the trace is timed: none is left to rank units by.
    """
    header = trace.header
    profile = np.setdiff1d(np.arange(header.n_tokens), tokens)
    if not len(profile):
        raise TraceError(f"has {header.n_tokens} tokens, all of which are timed: none is left to tell hot from cold",
                         key=header.name)
    words = words_of(trace.active)
    planes = _added([words[token] for token in profile.tolist()])
    every = words_of(np.packbits(np.ones((header.n_layers, header.n_units), np.bool_), axis=1, bitorder="little"))
    floors = _floors([uses for uses, _ in _by_count(planes, every)])
    classes = np.zeros((len(floors), *every.shape), np.uint64)
    for uses, units in _by_count(planes, every):
        classes[np.flatnonzero(floors <= uses)[0]] |= units
    sizes = np.array([count(units) for units in classes]).T
    added = np.zeros_like(sizes)
    for place, plane in enumerate(planes):
        added += np.array([count(units & plane) for units in classes]).T << place
    return HotTable(added / np.maximum(sizes, 1) / len(profile), sizes, len(profile), classes, words,
                    tokens)


def _added(sets: Sequence[Words]) -> list[Words]:
    """How many of the sets hold each unit, as a binary number: one set for each of its places, lowest first."""
    planes: list[Words] = []
    for carry in sets:
        for place, plane in enumerate(planes):
            planes[place], carry = plane ^ carry, plane & carry
        if carry.any():
            planes.append(carry)
    return planes


def _by_count(planes: Sequence[Words], units: Words) -> Iterator[tuple[int, Words]]:
    """(number, units that have it) for every number that some of `units` have, falling."""
    if not units.any():
        return
    if not planes:
        yield 0, units
        return
    highest = len(planes) - 1
    for number, found in _by_count(planes[:-1], units & planes[-1]):
        yield number + (1 << highest), found
    yield from _by_count(planes[:-1], units & ~planes[-1])


def _floors(seen: Sequence[int]) -> Ints:
    """Least count of each class, falling, the last 0, of the counts that there are (falling too)."""
    rising = np.array(seen[::-1], np.int64)
    if len(rising) > MAX_CLASSES:
        rising = rising[np.unique(np.linspace(0, len(rising) - 1, MAX_CLASSES).round().astype(np.int64))]
    found: Ints = np.unique(np.append(rising[1:], 0))[::-1].astype(np.int64)
    return found


def _used_of(classes: Words, sizes: Ints, words: Words, tokens: Ints) -> Ints:
    """(T, L, C) units of each class (C, L, W), of so many units (L, C), that each of the tokens uses."""
    found = np.zeros((len(tokens), *sizes.shape), np.int64)
    together = max(_TOGETHER // max(len(tokens), 1), 1)
    for layer, held in enumerate(sizes):
        active = np.ascontiguousarray(words[tokens, layer])  # a layer's stay in the processor's cache
        some = np.flatnonzero(held)
        for first in range(0, len(some), together):
            which = some[first: first + together]
            found[:, layer, which] = count(active[:, None] & classes[which, layer])
    return found
