"""What does a cache miss token by token, and what do prefetching and the page cache beneath it make of that?

The private cache sees the accesses. A predictor names units before each step; those not held are read ahead into a
buffer that lives as long as the step, so the cache behaves as without it: a miss that was read ahead is no demand miss,
what was read ahead and not used is waste. All that is read, on demand or ahead, goes through the page cache: one LRU
cache for all layers, whose pages of a step are pinned while it runs. What that misses comes from storage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.trace.bits import Words, count
from simmem.trace.caches import Cache, Lru, Policy, Scope, new_caches

__all__ = ["Levels", "step_through"]

Ints = NDArray[np.int64]
_BLOCK_BYTES = 1 << 18
"""Sets of all sizes that advance together, so that the processor's cache holds them."""


@dataclass(frozen=True)
class Levels:
    """Units by token and size, each (T, S) and over all layers."""

    missed: Ints
    """Not in the private cache when used."""
    wasted: Ints
    """Read ahead for a step that did not use them."""
    ahead: Ints
    """Of `missed`, those that had been read ahead."""
    from_storage: Ints
    """Read, and not in the page cache; all that is read where there is none."""
    in_both: Ints
    """Held by both caches after the token."""


def step_through(words: Words, policy: Policy, sizes: Ints, scope: Scope, *, cold_tokens: int,
                 predicted: Words | None = None, page_units: int | None = None) -> Levels:
    """Replay one policy at all sizes.

    Parameters
    ----------
    words : (T, L, W) units used.
    sizes : (S,) capacities in units, of a layer's cache or (global) of the one, or (S, L) for every layer its own; for
        windows their lengths in tokens, ascending.
    predicted : (T, L, W) units that a predictor names before the token; none when None.
    page_units : units the page cache holds.
    """
    per_block = max(1, _BLOCK_BYTES // max(words[0].nbytes, 1))
    blocks = [_block(words, policy, sizes[i : i + per_block], scope, cold_tokens, predicted, page_units)
              for i in range(0, len(sizes), per_block)]
    return Levels(*(np.concatenate(parts, axis=1) for parts in zip(*blocks, strict=True)))


def _block(words: Words, policy: Policy, sizes: Ints, scope: Scope, cold_tokens: int, predicted: Words | None,
           page_units: int | None) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    n_tokens, n_layers, n_words = words.shape
    own = scope == "layer"
    seen = words if own else words.reshape(n_tokens, 1, -1)
    cache = new_caches(policy, sizes, seen, n_steps=n_tokens if own else n_tokens * n_layers, cold_tokens=cold_tokens)
    pages = None
    if page_units is not None:
        pages = Lru(np.full((len(sizes), 1), page_units), n_layers * n_words, n_tokens, shared=False)
    missed, wasted, ahead, stored, both = np.zeros((5, n_tokens, len(sizes)), np.int64)
    in_layer = [slice(layer * n_words, (layer + 1) * n_words) for layer in range(n_layers)]
    steps = [slice(None)] if own or cache.whole_tokens else in_layer
    for token, used in enumerate(seen):
        cache.begin(token)
        for at in steps:
            guess = None if predicted is None else predicted[token].reshape(used.shape)[:, at] & ~cache.held[..., at]
            misses = cache.access(token, used[:, at], at)
            missed[token] += count(misses).sum(axis=1)
            if guess is not None:
                useful = count(guess & misses).sum(axis=1)
                ahead[token] += useful
                wasted[token] += count(guess).sum(axis=1) - useful
                misses = misses | guess
            if pages is None:
                continue
            reads = misses.reshape(len(sizes), 1, -1)
            for place in in_layer if at == slice(None) else [at]:
                start = place.start - (at.start or 0)
                fresh = pages.access(token, reads[..., start : start + n_words], place)
                stored[token] += count(fresh)[:, 0]
        if pages is not None:
            both[token] = _held_by_both(cache, pages)
    if pages is None:
        stored = missed + wasted
    return missed, wasted, ahead, stored, both


def _held_by_both(cache: Cache, pages: Lru) -> Ints:
    private = cache.held.reshape(pages.held.shape)
    return count(private & pages.held)[:, 0]
