"""Which cache policy, of what size, would have had how many hits on this trace?

Nothing is run or timed: accesses are counted, layer by layer, ascending unit id. The window policy keeps
what the last k tokens used; its counts over all k at once are a table (`window_table`) that the planner
turns into bytes and requests. A token-layer's units are pinned while it runs; what does not fit is read and
not cached, a miss; ties evict the lowest id. What happens while the cache is still filling (cold start) is
counted apart from steady state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmem.errors import SpecError, TraceError
from simmem.trace import recency
from simmem.trace.bits import Words, count, runs, words_of
from simmem.trace.caches import Policy, Scope
from simmem.trace.optimum import most_hits
from simmem.trace.queues import misses_by_part
from simmem.trace.stepping import step_through
from simmem.trace.trace import Trace

__all__ = [
    "ReplayCurve",
    "WindowState",
    "WindowTable",
    "cache_curve",
    "fewest_misses",
    "lru_curve",
    "run_table",
    "shrink_to_capacity",
    "window_curve",
    "window_table",
]

Ints = NDArray[np.int64]
_HANDFUL = {"lfu": 150, "slru": 1000}
"""Up to so many units moved at once, in all sizes, taking them one by one is quicker; measured, and not sharp."""
_BLOCK_BYTES = 1 << 19
"""Work on this much of a trace at a time, so that every pass over it finds it in the processor's cache."""


@dataclass(frozen=True)
class WindowTable:
    """What windows of k = 0 … max_window tokens hold and must read, token by token.

    T tokens, L layers, K = max_window. All counts are units.
    """

    tokens: Ints
    """(T,) token indices of the trace; each has a full window behind it (steady state)."""
    active_units: Ints
    """(T, L) units the token uses."""
    held_units: Ints
    """(T, L, K+1) units used by tokens t-k+1 … t, for k ≥ 1; at k = 0 the active ones, which are held only
    while they are used."""
    new_units: Ints
    """(T, L, K+1) units used by t and by none of t-k … t-1: what must be read. All active ones at k = 0."""
    n_units: int

    @property
    def max_window(self) -> int:
        return int(self.new_units.shape[2]) - 1


@dataclass(frozen=True)
class WindowState:
    """A window that shrinks where the capacity binds, replayed over consecutive tokens; arrays are (T, L)."""

    new_units: Ints
    """Units to read for the token."""
    held_units: Ints
    """Units kept cached after the token; 0 where not even one token's units fit."""
    window: Ints
    """The window k that decided the token's hits."""


@dataclass(frozen=True)
class ReplayCurve:
    """Hits and misses of one policy at N sizes; counts are over all tokens and layers of their part."""

    policy: Policy
    scope: Scope
    parameter: Ints
    """(N,) capacity in units, or (window) tokens."""
    sizes_units: NDArray[np.float64]
    """(N,) units of cache, of one layer or (global) of the whole model: the capacity; of a window what it
    holds on average."""
    peak_units: NDArray[np.float64]
    """(N,) the most units held at once, in the same scope."""
    hits: Ints
    misses: Ints
    tokens: int
    """Tokens of the steady part, which `hits` and `misses` count."""
    first_uses: int
    """Those of its misses that are the first use of a unit anywhere in the trace."""
    cold_hits: Ints
    cold_misses: Ints
    cold_tokens: int
    """Tokens at the start that are counted apart."""
    cold_first_uses: int

    @property
    def hit_ratio(self) -> NDArray[np.float64]:
        """(N,) hits per access in steady state; 1 where nothing was accessed."""
        accesses = self.hits + self.misses
        ratio: NDArray[np.float64] = np.where(accesses > 0, self.hits / np.maximum(accesses, 1), 1.0)
        return ratio

    def bytes_per_token(self, unit_bytes: float) -> NDArray[np.float64]:
        """(N,) bytes read per token in steady state, all layers. [B]"""
        return self.misses.astype(np.float64) * (unit_bytes / self.tokens)


def window_table(trace: Trace, max_window: int, *, tokens: ArrayLike | None = None) -> WindowTable:
    """Count what windows of 0 … `max_window` tokens hold and read on a trace.

    Parameters
    ----------
    tokens : (T,) token indices to cover, each at least `max_window`; all from `max_window` on when None.

    Raises
    ------
    TraceError
        The trace has no token with `max_window` tokens before it, or `tokens` leaves the trace.
    """
    covered = _covered(trace, max_window, tokens)
    held, new = _window_counts(words_of(trace.active), covered, max_window)
    return WindowTable(covered, new[:, :, 0], held, new, trace.header.n_units)


def shrink_to_capacity(table: WindowTable, window: int, capacity_units: ArrayLike) -> WindowState:
    """Replay a window of up to `window` tokens in a cache of `capacity_units` per layer.

    After token t the window is the largest k ≤ min(window, one more than after t-1) whose units fit; where not
    even the token's own do, k = 0: they are read and not kept. The hits of t are decided by the window after
    t-1. The first covered token finds the largest window that would fit after it.

    Parameters
    ----------
    table : of consecutive tokens.
    window : tokens, at most `table.max_window`.
    capacity_units : (L,) or a scalar; units each layer's cache may hold.

    Raises
    ------
    TraceError
        The table's tokens are not consecutive.
    SpecError
        The window is longer than the table's, or negative.
    """
    if not 0 <= window <= table.max_window:
        raise SpecError(f"found a window of {window} tokens, the table covers 0 to {table.max_window}",
                        key="window_tokens")
    if np.any(np.diff(table.tokens) != 1):
        raise TraceError("a window can shrink and grow only over consecutive tokens")
    capacity = np.broadcast_to(np.asarray(capacity_units), table.active_units.shape[1:])
    # held_units never falls with k ≥ 1, so counting the windows that fit finds the largest
    fits: Ints = np.sum(table.held_units[:, :, 1 : window + 1] <= capacity[:, None], axis=2, dtype=np.int64)
    # k(t) = min(fits(t), k(t-1) + 1) unrolls to the least of fits(s) + t - s over s ≤ t
    step = np.arange(len(fits))[:, None]
    after = np.minimum.accumulate(fits - step, axis=0) + step
    before = np.concatenate((after[:1], after[:-1]))
    held = np.take_along_axis(table.held_units, after[:, :, None], axis=2)[:, :, 0]
    new = np.take_along_axis(table.new_units, before[:, :, None], axis=2)[:, :, 0]
    return WindowState(new, np.where(after > 0, held, 0), before)


def run_table(trace: Trace, tokens: ArrayLike, windows: Sequence[int], gap_units: int) -> tuple[Ints, Ints]:
    """Read requests and units read when runs of new units are read at once, across small gaps.

    Parameters
    ----------
    tokens : (T,) token indices, each at least the longest window.
    windows : (K,) windows to count, in tokens, ascending.
    gap_units : units that may lie unused between two new ones of the same read; 0 joins only neighbours.

    Returns
    -------
    requests, spanned_units : (T, L, K) runs of the new units of token t under each window, and units read in
        them, those in the gaps included.
    """
    longest = max(windows, default=0)
    covered = _covered(trace, longest, tokens)
    words = words_of(trace.active)
    column = {k: i for i, k in enumerate(windows)}
    shape = (covered.size, words.shape[1], len(windows))
    requests, spanned = np.empty(shape, np.int64), np.empty(shape, np.int64)
    for rows in _blocks(covered, words[0].nbytes):
        at, active = covered[rows], words[covered[rows]]
        before = np.zeros_like(active)
        for k in range(longest + 1):
            if k:
                before |= words[at - k]
            if k in column:
                requests[rows, :, column[k]], spanned[rows, :, column[k]] = runs(active & ~before, gap_units)
    return requests, spanned


def window_curve(trace: Trace, windows: Sequence[int], *, cold_tokens: int | None = None) -> ReplayCurve:
    """Hits and misses of sliding windows of these lengths, in tokens; the scope is a layer.

    The first `cold_tokens` tokens (as many as the longest window when None) are counted apart.
    """
    longest = max(windows, default=0)
    if not windows or min(windows) < 0:
        raise SpecError(f"found the windows {list(windows)}, expected lengths of 0 tokens and more", key="windows")
    cold = _cold_tokens(trace, longest if cold_tokens is None else cold_tokens)
    words = words_of(trace.active)
    held, new = _window_counts(words, np.arange(trace.header.n_tokens), longest)
    chosen = np.asarray(windows, np.int64)
    kept = np.where(chosen > 0, held[cold:][:, :, chosen], 0)
    misses, active = new[:, :, chosen].sum(axis=1), new[:, :, 0].sum(axis=1)[:, None]
    first = _first_uses(words)
    return ReplayCurve(
        "window", "layer", chosen, kept.mean(axis=(0, 1)), kept.max(axis=(0, 1)).astype(np.float64),
        (active - misses)[cold:].sum(axis=0), misses[cold:].sum(axis=0), trace.header.n_tokens - cold,
        int(first[cold:].sum()),
        (active - misses)[:cold].sum(axis=0), misses[:cold].sum(axis=0), cold, int(first[:cold].sum()))


def cache_curve(trace: Trace, policy: Policy, capacities_units: ArrayLike, *, scope: Scope = "layer",
                cold_tokens: int | None = None) -> ReplayCurve:
    """Hits and misses of caches of these capacities under any policy but the window (`simmem.trace.caches`).

    For lru one pass gives all capacities that hold the largest step; the others are replayed at every capacity, all of
    them advancing together. Belady's are the fewest misses possible in the cold part and in the steady one, each for
    itself, and are counted rather than replayed (`simmem.trace.optimum`).

    Parameters
    ----------
    capacities_units : (N,) units, of each layer's own cache or (global) of one cache for all layers.
    cold_tokens : tokens at the start that are counted apart; a quarter of the trace when None.
    """
    capacities = np.atleast_1d(np.asarray(capacities_units, np.int64))
    if capacities.ndim != 1 or capacities.size == 0 or np.any(capacities < 0):
        raise SpecError("expected a list of capacities of 0 units and more", key="capacities_units")
    header = trace.header
    cold = _cold_tokens(trace, header.n_tokens // 4 if cold_tokens is None else cold_tokens)
    words = words_of(trace.active)
    accesses = count(words).sum(axis=1)
    parts = int(accesses[:cold].sum()), int(accesses[cold:].sum())
    misses = np.empty((2, capacities.size), np.int64)
    steps = header.n_tokens * (header.n_layers if scope == "global" else 1)  # a replay by sets takes so many
    by_step = np.ones(capacities.size, np.bool_)
    if policy == "belady":
        by_step[:] = False
        for part, tokens, counted in ((0, cold, 0), (1, header.n_tokens, cold)):
            misses[part] = parts[part] - most_hits(trace.active[:tokens], header.n_units, capacities, scope, counted)
    elif policy in ("lfu", "slru") and capacities.size * sum(parts) <= _HANDFUL[policy] * steps:
        by_step[:] = False
        misses[:] = misses_by_part(trace.active, header.n_units, policy, capacities, scope, cold)
    elif policy == "lru":
        by_step = capacities < count(words).max(initial=0)
        if not by_step.all():
            ranked = recency.global_ranks if scope == "global" else recency.layer_ranks
            ranks = ranked(trace.active, header.n_units, cold)
            for part, histograms in enumerate((ranks.cold, ranks.steady)):
                below = np.concatenate((np.zeros(1, np.int64), np.cumsum(histograms.sum(axis=0))))
                misses[part] = parts[part] - below[np.minimum(capacities, below.size - 1)]
    if by_step.any():
        found = step_through(words, policy, capacities[by_step], scope, cold_tokens=cold).missed
        misses[0, by_step], misses[1, by_step] = found[:cold].sum(axis=0), found[cold:].sum(axis=0)
    first = _first_uses(words)
    sizes = capacities.astype(np.float64)
    return ReplayCurve(
        policy, scope, capacities, sizes, sizes,
        parts[1] - misses[1], misses[1], header.n_tokens - cold, int(first[cold:].sum()),
        parts[0] - misses[0], misses[0], cold, int(first[:cold].sum()))


def lru_curve(trace: Trace, capacities_units: ArrayLike, *, scope: Scope = "layer",
              cold_tokens: int | None = None) -> ReplayCurve:
    """`cache_curve` of least-recently-used caches."""
    return cache_curve(trace, "lru", capacities_units, scope=scope, cold_tokens=cold_tokens)


def fewest_misses(trace: Trace, curve: ReplayCurve) -> Ints:
    """(N,) Belady's misses in steady state at the same capacities and scope.

    A window is compared with caches that hold in each layer what it holds there at most, from the last cold token on.
    """
    sizes, header = curve.parameter, trace.header
    if curve.policy == "window":
        held, _ = _window_counts(words_of(trace.active), np.arange(max(curve.cold_tokens - 1, 0), header.n_tokens),
                                 int(sizes.max()))
        sizes = np.where(sizes[:, None] > 0, held.max(axis=0)[:, sizes].T, 0)
    return curve.hits + curve.misses - most_hits(trace.active, header.n_units, sizes, curve.scope, curve.cold_tokens)


def _window_counts(words: Words, tokens: Ints, max_window: int) -> tuple[Ints, Ints]:
    """held, new (T, L, K+1) of any tokens; before the start of the trace nothing was used.

    Both are sizes of unions: what k tokens held, and how much the next one adds to it.
    """
    ends = np.unique(np.append(tokens, tokens - 1))
    sizes = _union_sizes(words, ends, max_window + 1)
    to, before = sizes[np.searchsorted(ends, tokens)], sizes[np.searchsorted(ends, tokens - 1)]
    held = to[:, :, :-1].copy()
    held[:, :, 0] = to[:, :, 1]
    return held, to[:, :, 1:] - before[:, :, :-1]


def _union_sizes(words: Words, ends: Ints, longest: int) -> Ints:
    """(T, L, longest + 1) units that 0 … `longest` tokens use, the last of them at `ends`; -1 is before the trace."""
    sizes = np.zeros((ends.size, words.shape[1], longest + 1), np.int64)
    for rows in _blocks(ends, words[0].nbytes):
        at = ends[rows]
        union = np.zeros((len(at), *words.shape[1:]), np.uint64)
        for k in range(longest):
            has = at >= k
            if has.all():  # in place, and without a copy where the tokens follow one another
                first, last = int(at[0]), int(at[-1])
                joined = words[first - k: last - k + 1] if last - first + 1 == len(at) else words[at - k]
                np.bitwise_or(union, joined, out=union)
            elif has.any():
                union[has] |= words[at[has] - k]
            sizes[rows, :, k + 1] = count(union)
    return sizes


def _first_uses(words: Words) -> Ints:
    """(T,) units that a token is the first to use."""
    seen = np.zeros_like(words[0])
    first = np.empty(len(words), np.int64)
    for rows in _blocks(np.arange(len(words)), words[0].nbytes):
        up_to = np.bitwise_or.accumulate(words[rows], axis=0) | seen
        before = np.concatenate((seen[None], up_to[:-1]))
        first[rows] = count(words[rows] & ~before).sum(axis=1)
        seen = up_to[-1]
    return first


def _blocks(tokens: Ints, token_bytes: int) -> list[slice]:
    size = max(1, _BLOCK_BYTES // token_bytes)
    return [slice(start, min(start + size, tokens.size)) for start in range(0, tokens.size, size)]


def _covered(trace: Trace, max_window: int, tokens: ArrayLike | None) -> Ints:
    n_tokens = trace.header.n_tokens
    if max_window < 0:
        raise SpecError(f"found a window of {max_window} tokens", key="window_tokens")
    if max_window >= n_tokens:
        raise TraceError(f"has {n_tokens} tokens, too few for a window of {max_window}", key=trace.header.name)
    covered = np.arange(max_window, n_tokens) if tokens is None else np.atleast_1d(np.asarray(tokens, np.int64))
    if covered.ndim != 1 or covered.size == 0 or covered.min() < max_window or covered.max() >= n_tokens:
        raise TraceError(f"can cover tokens {max_window} to {n_tokens - 1} with a window of {max_window}",
                         key=trace.header.name)
    return covered


def _cold_tokens(trace: Trace, cold_tokens: int) -> int:
    if not 0 <= cold_tokens < trace.header.n_tokens:
        raise TraceError(f"has {trace.header.n_tokens} tokens, too few to count {cold_tokens} of them apart",
                         key=trace.header.name)
    return cold_tokens
