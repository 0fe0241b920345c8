"""What does a cache of this policy hold after each step, and what did the step miss?

A step is what is used at once: one layer's units of a token. Its hits are decided by what is held before it; its units
are pinned while it runs; of its misses those with the lowest ids are kept while there is room beside what it pins, the
rest is read and not cached. Then the policy evicts from what the step did not use, ties lowest id first.

    lru      the unit whose last use lies furthest back
    lfu      the one used least often since the start; uses still count after an eviction
    slru     two segments in one cache: a miss enters probation, a hit makes a unit protected. At most 80 % of the
             capacity is protected: above it the one that entered that segment first goes back to probation, entering it
             anew (a hit on a protected unit enters anew, too). Probation is evicted first, then the protected; in both
             the unit that entered first. A step's hits are promoted before its misses enter
    belady   keeps the c of (held ∪ used) whose next use comes first: what is used once need not be cached. No choice of
             what to hold has fewer misses in the counted part of the trace (Belady 1966; steps in place of references)
    pin-hot  what the cold part used most often, from its end on; what that did not use is never held
    window   what the last k tokens used, however much that is

All sizes and all layers advance together; sets are rows of words, one bit a unit (`simmem.trace.bits`). Units of one
trace have one size; a trace that mixed sizes would need its optimum bounded rather than computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from math import isqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simmem.trace.bits import Words, count
from simmem.trace.ordering import Numbers, first_ids, numbers

__all__ = ["POLICIES", "PROTECTED_TENTHS", "Cache", "Lru", "Policy", "Scope", "new_caches"]

Ints = NDArray[np.int64]
Scope = Literal["layer", "global"]
Policy = Literal["window", "lru", "lfu", "slru", "pin-hot", "belady"]
POLICIES: tuple[Policy, ...] = ("window", "lru", "lfu", "slru", "pin-hot", "belady")
_ROW = slice(None)
PROTECTED_TENTHS = 8


class Cache(ABC):
    """S × R caches; `held` (S, R, V) is what they hold, `capacity` (S, R) what they may hold at most. [units]"""

    whole_tokens = False
    """Whether a token's layers may be accessed at once though they share a cache: nothing changes between them."""

    def __init__(self, capacity: Ints, words: int) -> None:
        self.capacity = capacity
        self.held: Words = np.zeros((*capacity.shape, words), np.uint64)

    def begin(self, token: int) -> None:  # noqa: B027 - most need nothing
        """Called before the accesses of each token, in turn."""

    @abstractmethod
    def access(self, token: int, used: Words, at: slice = _ROW) -> Words:
        """Use units, (R, w) or (S, R, w) words `at` of each row; returns those missed, (S, R, w)."""


class _Demand(Cache):
    """A cache that keeps what it had to read, and evicts for it."""

    def __init__(self, capacity: Ints, words: int) -> None:
        super().__init__(capacity, words)
        self.n_held = np.zeros_like(capacity)

    def access(self, token: int, used: Words, at: slice = _ROW) -> Words:
        hits = self.held[..., at] & used
        missed = used ^ hits
        room = self.capacity - count(hits)
        n_kept = count(missed)
        kept = missed
        if (n_kept > room).any():
            kept, n_kept = first_ids(missed, room), np.minimum(n_kept, room)
        self._note(token, used, hits, at)
        excess = self.n_held + n_kept - self.capacity
        if (excess > 0).any():
            excess = np.maximum(excess, 0)
            loose = self.held.copy()
            loose[..., at] ^= hits
            self.held ^= self._victims(loose, excess)
            self.n_held -= excess
        self.held[..., at] |= kept
        self.n_held += n_kept
        return missed

    @abstractmethod
    def _note(self, token: int, used: Words, hits: Words, at: slice) -> None:
        """Remember what the policy goes by."""

    @abstractmethod
    def _victims(self, loose: Words, n: Ints) -> Words:
        """The `n` units of each cache to evict, of those that are not pinned."""


class Lru(_Demand):
    """`shared`: all sizes see the same uses. The token is time enough: what it uses in one cache after the other is in
    the order of the ids, which decide ties."""

    def __init__(self, capacity: Ints, words: int, n_tokens: int, *, shared: bool = True) -> None:
        super().__init__(capacity, words)
        self._last_use = numbers(self.held.shape[shared:], n_tokens - 1, len(capacity) if shared else 1)

    def _note(self, token: int, used: Words, hits: Words, at: slice) -> None:
        self._last_use.put(used, token, at)

    def _victims(self, loose: Words, n: Ints) -> Words:
        return self._last_use.lowest(loose, n)


class _Lfu(_Demand):
    def __init__(self, capacity: Ints, words: int, n_tokens: int) -> None:
        super().__init__(capacity, words)
        self._uses = numbers(self.held.shape[1:], n_tokens, len(capacity))

    def _note(self, token: int, used: Words, hits: Words, at: slice) -> None:
        self._uses.increment(used, at)

    def _victims(self, loose: Words, n: Ints) -> Words:
        return self._uses.lowest(loose, n)


class _Slru(_Demand):
    def __init__(self, capacity: Ints, words: int, n_steps: int) -> None:
        super().__init__(capacity, words)
        self._protected = np.zeros_like(self.held)
        self._n_protected = np.zeros_like(capacity)
        self._limit = capacity * PROTECTED_TENTHS // 10
        self._entered = numbers(self.held.shape, n_steps)
        self._step = 0

    def _note(self, token: int, used: Words, hits: Words, at: slice) -> None:
        self._step += 1
        self._entered.put(used, self._step, at)
        protected = self._protected[..., at]
        self._n_protected += count(hits & ~protected)
        protected |= hits
        over = self._n_protected - self._limit
        if (over > 0).any():
            over = np.maximum(over, 0)
            demoted = self._entered.lowest(self._protected, over)
            self._protected ^= demoted
            self._n_protected -= over
            self._entered.put(demoted, self._step, _ROW)

    def _victims(self, loose: Words, n: Ints) -> Words:
        on_probation = loose & ~self._protected
        first = np.minimum(n, count(on_probation))
        gone = self._entered.lowest(on_probation, first)
        if (first < n).any():
            others = self._entered.lowest(loose & self._protected, n - first)
            self._protected ^= others
            self._n_protected -= n - first
            gone |= others
        return gone


class _Belady(Cache):
    """Sees the future: `uses` gives the next uses of each token's units in turn (`_next_uses`)."""

    def __init__(self, capacity: Ints, words: int, uses: Iterator[Numbers]) -> None:
        super().__init__(capacity, words)
        self._uses = uses
        self._n_held = np.zeros_like(capacity)

    def begin(self, token: int) -> None:
        self._now = next(self._uses)
        if token == 0:
            self._next_use = self._now.copy()

    def access(self, token: int, used: Words, at: slice = _ROW) -> Words:
        self._next_use.take(self._now, used, at)
        held = self.held[..., at]
        missed = used & ~held
        held |= used
        self._n_held += count(missed)
        excess = self._n_held - self.capacity
        if (excess > 0).any():
            excess = np.maximum(excess, 0)
            self.held ^= self._next_use.highest(self.held, excess)
            self._n_held -= excess
        return missed


def _next_uses(words: Words, counted_from: int, sizes: int) -> Iterator[Numbers]:
    """For each token of (T, R, V) words the token that uses each of its units next; T + 1 where none does.

    Uses before token `counted_from` do not count: a next use among them is as good as none.
    Found from the end backwards, for about √T tokens at a time so that memory stays small.
    """
    n_tokens = len(words)
    never, block = n_tokens + 1, isqrt(n_tokens) + 1
    ahead = numbers(words.shape[1:], never, sizes)
    everything = ~np.zeros_like(words[0])
    ahead.put(everything, never, _ROW)

    def back(start: int) -> Iterator[Numbers]:
        for token in reversed(range(start, min(start + block, n_tokens))):
            yield ahead
            ahead.put(words[token], token if token >= counted_from else never, _ROW)

    starts = range(0, n_tokens, block)
    ends: list[Numbers] = []
    for start in reversed(starts):
        ends.append(ahead.copy())
        deque(back(start), maxlen=0)
    for start in starts:
        ahead.take(ends.pop(), everything, _ROW)
        yield from reversed([after.copy() for after in back(start)])


class _PinHot(Cache):
    whole_tokens = True

    def __init__(self, capacity: Ints, words: int, cold_tokens: int) -> None:
        super().__init__(capacity, words)
        self._cold_tokens = cold_tokens
        self._uses = numbers(self.held.shape[1:], cold_tokens, len(capacity))
        self._used = np.zeros(self.held.shape[1:], np.uint64)

    def begin(self, token: int) -> None:
        if token == self._cold_tokens:
            self.held |= self._uses.highest(np.broadcast_to(self._used, self.held.shape), self.capacity)

    def access(self, token: int, used: Words, at: slice = _ROW) -> Words:
        if token < self._cold_tokens:
            self._uses.increment(used, at)
            self._used[..., at] |= used
        return used & ~self.held[..., at]


class _Window(Cache):
    """The capacity is a number of tokens; sizes ascend."""

    def __init__(self, capacity: Ints, words: int) -> None:
        super().__init__(capacity, words)
        self._lengths = capacity[:, 0].tolist()
        self._recent: deque[Words] = deque(maxlen=max(self._lengths, default=0))

    def access(self, token: int, used: Words, at: slice = _ROW) -> Words:
        missed = used & ~self.held
        self._recent.appendleft(used)
        union = np.zeros_like(used)
        done = 0
        for held, length in zip(self.held, self._lengths, strict=True):
            for past in list(self._recent)[done:length]:
                union |= past
            done = max(done, length)
            held[:] = union
        return missed


def new_caches(policy: Policy, sizes: Ints, words: Words, *, n_steps: int, cold_tokens: int) -> Cache:
    """Empty caches of one policy for a trace.

    Parameters
    ----------
    sizes : (S,) or (S, R) capacities of each cache in units, or the lengths of windows in tokens, ascending.
    words : (T, R, V) the trace as its caches see it: R caches of one layer each, or one of all layers.
    n_steps : how often each is accessed at most: T, or T times the layers that share a cache.
    cold_tokens : tokens that pin-hot learns from and whose hits belady does not count.
    """
    n_tokens, rows, n_words = words.shape
    capacity = np.repeat(sizes[:, None], rows, axis=1) if sizes.ndim == 1 else sizes
    match policy:
        case "window":
            return _Window(capacity, n_words)
        case "lru":
            return Lru(capacity, n_words, n_tokens)
        case "lfu":
            return _Lfu(capacity, n_words, n_tokens)
        case "slru":
            return _Slru(capacity, n_words, n_steps)
        case "pin-hot":
            return _PinHot(capacity, n_words, cold_tokens)
        case "belady":
            return _Belady(capacity, n_words, _next_uses(words, cold_tokens, len(sizes)))
