"""What does each token miss in each layer of caches of experts, and what of it was asked for a layer early?

The same caches as in a replay (`simmem.trace.caches`), one a layer, but counted by token and layer rather than summed:
a plan times every layer of a token by itself. What a predictor asked for before the layer is read into buffers that
live as long as the layer runs, so the cache behaves as without it (`simmem.trace.stepping`). Below the caches there may
be larger ones of the same layers, in host memory: least recently used, of all that is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simmem.errors import TraceError
from simmem.trace.bits import Words, count, words_of
from simmem.trace.caches import Lru, Policy, new_caches
from simmem.trace.trace import Trace

__all__ = ["LayerMisses", "asked_a_layer_early", "misses_by_layer"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LayerMisses:
    """Units by token, size and layer, each (T, S, L)."""

    missed: Ints
    """Used and not held."""
    ahead: Ints
    """Of `missed`, those that had been asked for a layer early."""
    wasted: Ints
    """Asked for early, not held, and not used."""
    late_below: Ints
    """Of `missed` and not `ahead`, those that the cache below did not hold either; all where there is none."""
    early_below: Ints
    """The same of `ahead` and `wasted` together."""


def asked_a_layer_early(trace: Trace) -> NDArray[np.uint8] | None:
    """(T, L, ceil(n_units / 8)) what the gate of each layer asked for when it was shown the input of the layer before.

    Of several records the one that asks for fewest; None where the trace holds none.
    """
    held = [predictor for predictor in trace.header.predictors if predictor.held]
    found = [(p.asked_share, i) for i, p in enumerate(held) if p.name == "next-layer" and p.layers_ahead == 1]
    if not found:
        return None
    asked: NDArray[np.uint8] = trace.extras["asked"][min(found)[1]]
    return asked


def misses_by_layer(trace: Trace, policy: Policy, capacities_units: Ints, *, cold_tokens: int,
                    asked: NDArray[np.uint8] | None = None, below_units: int | None = None) -> LayerMisses:
    """Replay caches of one policy, one a layer, at all capacities.

    Parameters
    ----------
    capacities_units : (S,) units that the cache of every layer may hold.
    cold_tokens : tokens that pin-hot learns from.
    asked : (T, L, ceil(n_units / 8)) units asked for a layer early; nothing is when None. The first layer has none
        before it.
    below_units : units of a layer that the cache below holds.
    """
    if not 0 <= cold_tokens < trace.header.n_tokens:
        raise TraceError(f"has {trace.header.n_tokens} tokens, too few to learn from {cold_tokens}",
                         key=trace.header.name)
    words: Words = words_of(trace.active)
    guesses: Words | None = None
    if asked is not None:
        guesses = words_of(asked).copy()
        guesses[:, 0] = 0
    n_tokens, n_layers, n_words = words.shape
    sizes = np.asarray(capacities_units, np.int64)
    cache = new_caches(policy, sizes, words, n_steps=n_tokens, cold_tokens=cold_tokens)
    below = None
    if below_units is not None:  # one for each size: what reaches it depends on what the cache above missed
        below = Lru(np.full((len(sizes), n_layers), below_units), n_words, n_tokens, shared=False)
    found = np.zeros((5, n_tokens, len(sizes), n_layers), np.int64)
    missed, ahead, wasted, late_below, early_below = found
    nothing = np.zeros_like(words[0])
    for token, used in enumerate(words):
        cache.begin(token)
        early = (nothing if guesses is None else guesses[token]) & ~cache.held
        misses = cache.access(token, used)
        missed[token] = count(misses)
        ahead[token] = count(misses & early)
        wasted[token] = count(early & ~misses)
        if below is not None:
            below.begin(token)
            from_storage = below.access(token, misses | early)
            early_below[token], late_below[token] = count(from_storage & early), count(from_storage & ~early)
    if below is None:
        late_below[:], early_below[:] = missed - ahead, ahead + wasted
    return LayerMisses(*found)
